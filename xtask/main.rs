//! Writes the generated files of the repository: `make generate`, or `cargo run --example xtask`. This is an example
//! target instead of a subcommand of the operator because only developers need it.

#![allow(clippy::expect_used, reason = "a developer tool stops at the first error")]

mod api_reference;

use std::fmt::Write as _;
use std::path::Path;

use zitadel_tokens::api::metadata::ALLOWED_SECRET_METADATA;
use zitadel_tokens::cli::crds;
use zitadel_tokens::controller::metrics::described;
use zitadel_tokens::domain::reason::Reason;
use zitadel_tokens::domain::retry::Retry;

fn main() {
    let crds = crds::yaml().expect("the CRDs render");
    let files = [
        ("crds/zitadel-tokens.yaml", crds.clone()),
        ("charts/zitadel-tokens/files/crds.yaml", crds),
        (
            "charts/zitadel-tokens/files/allowed-secret-metadata.txt",
            ALLOWED_SECRET_METADATA.map(|entry| format!("{entry}\n")).concat(),
        ),
        ("docs/reference/api.md", api_reference::page()),
        ("docs/reasons.md", reasons()),
        ("docs/metrics.md", metrics()),
    ];
    for (file, text) in files {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

fn reasons() -> String {
    let mut page = String::from(
        "# Reasons\n\nAll reasons in conditions, `status` and Events. Generated from the code by `make generate`.\n\n\
         | reason | retry | meaning | remedy |\n|---|---|---|---|\n",
    );
    for reason in Reason::ALL {
        let retry = match reason.retry() {
            Retry::No => "none",
            Retry::Permanent => "on a change, otherwise about every 10 min",
            Retry::Rare => "on a change, otherwise about every 6 h",
            Retry::Eventual => "on a change, otherwise after 1 s, 2 s and 4 s, then about every 10 min",
            Retry::Transient => "backoff from 1 s to 5 min",
            Retry::Soon => "backoff from 1 s to 10 s",
        };
        let (meaning, remedy) = (reason.meaning(), reason.remedy());
        writeln!(page, "| `{reason}` | {retry} | {meaning} | {remedy} |").expect("written");
    }
    page
}

fn metrics() -> String {
    let mut page = String::from(
        "# Metrics\n\nAll metrics that `/metrics` serves. Generated from the code by `make generate`. \
         [monitoring.md](monitoring.md) describes the scrape configuration, the alerts and the dashboard.\n\n\
         | metric | type | labels | meaning |\n|---|---|---|---|\n",
    );
    for metric in described::ALL {
        let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let (name, kind, labels, help) = (metric.name, metric.kind.as_str(), labels.join(", "), metric.help);
        let per_object = if metric.is_per_object() {
            " One series per object."
        } else {
            ""
        };
        writeln!(page, "| `{name}` | {kind} | {labels} | {help}.{per_object} |").expect("written");
    }
    page
}

//! The house stands as it was drawn: who may use whom, and that one file writes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Rooms, and what each may use besides itself (docs/architecture.md).
const ARROWS: &[(&str, &[&str])] = &[
    ("api", &[]),
    ("ops", &[]),
    ("domain", &["api"]),
    ("zitadel", &["domain"]),
    ("controller", &["zitadel", "domain", "api", "ops"]),
    ("cli", &["controller", "zitadel", "domain", "api", "ops"]),
];

fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder)
        .expect("a folder")
        .map(|e| e.expect("readable").path())
    {
        if entry.is_dir() {
            all.extend(sources(&entry));
        } else if entry.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&entry).expect("readable");
            all.push((entry, text));
        }
    }
    all
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

#[test]
fn rooms_use_only_whom_they_may() {
    for (room, may_use) in ARROWS {
        let folder = source().join(room);
        let files = sources(&folder);
        assert!(!files.is_empty(), "{room} is empty");
        for (path, text) in files {
            for used in text.split("crate::").skip(1) {
                let other: String = used
                    .chars()
                    .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                    .collect();
                let known = ARROWS.iter().any(|(r, _)| *r == other);
                let allowed = other == *room || may_use.contains(&other.as_str());
                assert!(known && allowed, "{} uses crate::{other}", path.display());
            }
            assert!(
                !text.contains("super::super"),
                "{} reaches past its parent",
                path.display()
            );
        }
    }
    let rooms: BTreeSet<String> = std::fs::read_dir(source())
        .expect("a folder")
        .map(|e| e.expect("readable"))
        .filter(|e| e.path().is_dir())
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(rooms, ARROWS.iter().map(|(r, _)| (*r).to_owned()).collect());
}

#[test]
fn the_domain_is_pure() {
    for (path, text) in sources(&source().join("domain")) {
        for word in [
            "kube::", "reqwest", "tokio", "::now()", "spawn", "async ", "std::env", "std::fs", "tracing",
        ] {
            assert!(!text.contains(word), "{} says {word:?}", path.display());
        }
    }
    for (path, text) in sources(&source().join("zitadel")) {
        assert!(!text.contains("kube::"), "{} knows Kubernetes", path.display());
    }
}

/// Token Secrets and status are written by one file; the Lease, of which `controller` knows nothing, by another, which
/// writes nothing else.
#[test]
fn one_file_writes_to_kubernetes_and_one_its_lease() {
    let writes = [
        ".patch(",
        ".patch_status(",
        ".replace(",
        ".replace_status(",
        ".create(",
        ".delete(",
        ".delete_collection(",
        ".publish(",
    ];
    for room in ["controller", "ops", "cli"] {
        for (path, text) in sources(&source().join(room)) {
            if path.ends_with("controller/write.rs") {
                continue;
            }
            let text = if path.ends_with("ops/election.rs") {
                assert_eq!(text.matches("Api<").count(), 1, "{} writes more", path.display());
                assert!(text.contains("leases: Api<Lease>"), "{} writes more", path.display());
                text.replace("self.leases.replace(", "")
                    .replace("self.leases.create(", "")
            } else {
                text
            };
            // What is called on a string or a queue is not a write.
            for call in writes {
                assert!(!text.contains(call), "{} calls {call}", path.display());
            }
        }
    }
}

/// A row of docs/faults.md is only worth what shows it.
#[test]
fn every_fault_in_the_docs_is_shown_by_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let code: String = [sources(&root.join("tests")), sources(&source())]
        .concat()
        .into_iter()
        .map(|(_, text)| text)
        .collect();
    let page = std::fs::read_to_string(root.join("docs/faults.md")).expect("readable");
    let reasons: Vec<_> = zitadel_tokens::domain::reason::Reason::ALL
        .iter()
        .map(|r| r.name())
        .collect();
    let quoted = |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| fault "));
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        assert_eq!(cells.len(), 6, "{row}");
        let tests = quoted(cells[5]);
        assert!(!tests.is_empty(), "nothing shows: {row}");
        for test in tests {
            assert!(code.contains(&format!("fn {test}(")), "no test is called {test}");
        }
        for reason in quoted(cells[1]) {
            let named =
                reason.chars().all(char::is_alphabetic) && reason.chars().filter(|c| c.is_uppercase()).count() > 1;
            assert!(!named || reasons.contains(&&*reason), "no reason is called {reason}");
        }
    }
}

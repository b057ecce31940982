//! `zitadel-tokens metrics`: the page of metrics, made from their table.

use crate::controller::metrics::described::markdown;

/// Prints the page.
pub fn print() {
    print!(
        "# Metrics\n\n\
         What `/metrics` serves. Made from the code by `make docs`. [monitoring.md](monitoring.md) has the scrape, the \
         alerts and the dashboard.\n\n{}",
        markdown()
    );
}

//! `zitadel-tokens allowed-secret-metadata`.

use crate::api::metadata::ALLOWED_SECRET_METADATA;

/// Prints the list, one entry a line; the chart is made with it.
pub fn print() {
    for entry in ALLOWED_SECRET_METADATA {
        println!("{entry}");
    }
}

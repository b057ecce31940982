//! `zitadel-tokens reasons`: the page of reasons, made from the enum.

use crate::domain::reason::markdown;

/// Prints the page.
pub fn print() {
    print!(
        "# Reasons\n\n\
         Every way an attempt can end, as `status`, conditions and Events show it. Made from the code by `make docs`.\n\n{}",
        markdown()
    );
}

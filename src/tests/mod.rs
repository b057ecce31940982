//! Tests that span several modules and need private fixtures.

mod model;
mod redaction;

//! Tests of more than one room that need private fixtures.

mod redaction;

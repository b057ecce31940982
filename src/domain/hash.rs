//! Hashes of requests, of written content, and of names for a jitter that is the same after a restart.

use aws_lc_rs::digest::{Context, SHA256};

/// SHA-256 over `parts`, in hexadecimal, truncated to 128 bits. Each part is preceded by its length, so that different
/// lists have different inputs. 128 bits suffice, because a collision gains an attacker nothing.
#[must_use]
pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    use std::fmt::Write;
    digest(parts)[..16]
        .iter()
        .fold(String::with_capacity(32), |mut hex, byte| {
            // Writing to a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
}

/// A number in `0.0..1.0` that depends only on the seed.
#[must_use]
pub fn fraction(seed: &str) -> f64 {
    let digest = digest([seed.as_bytes()]);
    let number = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
    f64::from(number) / (f64::from(u32::MAX) + 1.0)
}

fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

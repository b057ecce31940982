//! Which labels and annotations users may set on token Secrets (`docs/adr/0001-allow-list-for-secret-metadata.md`).

use std::collections::BTreeSet;

use crate::api::metadata::{ALLOWED_SECRET_METADATA, is_operators_own};
use crate::domain::validate::is_metadata_key;

/// Maximum number of entries that the platform team can add. The chart's admission policy compares every key with all
/// entries, and the API server limits the cost of an expression.
pub const MOST_ADDED: usize = 64;

/// The allowed keys. `PREFIX/*` allows all keys with that prefix.
#[derive(Clone, Debug)]
pub struct AllowList(BTreeSet<String>);

impl Default for AllowList {
    fn default() -> Self {
        Self(ALLOWED_SECRET_METADATA.map(str::to_owned).into())
    }
}

impl AllowList {
    /// The defaults plus the entries of the platform team. The error describes the first entry that cannot be added.
    pub fn with(added: &[impl AsRef<str>]) -> Result<Self, String> {
        let mut all = Self::default();
        if added.len() > MOST_ADDED {
            return Err(format!(
                "At most {MOST_ADDED} entries can be added, not {}.",
                added.len()
            ));
        }
        for entry in added.iter().map(AsRef::as_ref) {
            if let Some(rule) = refusal(entry) {
                return Err(format!("`{entry}` cannot be added: {rule}."));
            }
            all.0.insert(entry.to_owned());
        }
        Ok(all)
    }

    /// Whether users may set `key`.
    #[must_use]
    pub fn allows(&self, key: &str) -> bool {
        let by_prefix = |(prefix, _): (&str, &str)| self.0.contains(&format!("{prefix}/*"));
        self.0.contains(key) || key.split_once('/').is_some_and(by_prefix)
    }
}

fn refusal(entry: &str) -> Option<&'static str> {
    let prefix = entry.strip_suffix("/*");
    // A prefix is well-formed if a key with this prefix is well-formed.
    let key = prefix.map_or_else(|| entry.to_owned(), |prefix| format!("{prefix}/x"));
    if !is_metadata_key(&key) {
        return Some("write a key such as `example.com/team`, or a prefix such as `example.com/*`");
    }
    if is_operators_own(&key) {
        return Some("the operator sets such keys itself");
    }
    let of_kubernetes = |prefix: &str| {
        let mut domains = ["kubernetes.io", "k8s.io"].into_iter();
        domains.any(|domain| prefix == domain || prefix.ends_with(&format!(".{domain}")))
    };
    prefix
        .is_some_and(of_kubernetes)
        .then_some("Kubernetes and its controllers act on keys of this domain; add single keys instead")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_allowed_by_name_or_by_whole_prefix() {
        let list = AllowList::with(&["team", "example.com/*", "example.org/cost-center"]).expect("well-formed");
        for (key, allowed) in [
            ("app.kubernetes.io/part-of", true),
            ("reloader.stakater.com/match", true),
            ("team", true),
            ("example.com/anything", true),
            ("example.org/cost-center", true),
            ("Team", false),
            ("teams", false),
            ("example.com/team", true),
            ("example.com", false),
            ("a.example.com/team", false),
            ("example.com.evil.org/team", false),
            ("example.org/team", false),
            ("example.org/cost-center2", false),
            ("part-of", false),
            ("reloader.stakater.com", false),
        ] {
            assert_eq!(list.allows(key), allowed, "{key}");
        }
        assert!(!AllowList::default().allows("team"));
    }

    #[test]
    fn default_entries_pass_the_rules_for_added_entries() {
        AllowList::with(&ALLOWED_SECRET_METADATA).expect("well-formed");
    }

    #[test]
    fn malformed_and_reserved_entries_are_rejected() {
        for (entry, expected) in [
            ("team", ""),
            ("example.com/*", ""),
            ("kubernetes.io/description", ""),
            ("app.kubernetes.io/instance", ""),
            ("cluster.x-k8s.io/*", ""),
            ("notkubernetes.io/*", ""),
            ("", "write a key"),
            ("*", "write a key"),
            ("/*", "write a key"),
            ("*/*", "write a key"),
            ("*.example.com/*", "write a key"),
            ("example.com/a*", "write a key"),
            ("example.com/*/*", "write a key"),
            ("Example.com/*", "write a key"),
            ("a b", "write a key"),
            ("a\"b", "write a key"),
            (" team", "write a key"),
            ("app.kubernetes.io/managed-by", "sets such keys itself"),
            ("zitadel-tokens.dev/*", "sets such keys itself"),
            ("zitadel-tokens.dev/record", "sets such keys itself"),
            ("x.zitadel-tokens.dev/*", "sets such keys itself"),
            ("kubernetes.io/*", "add single keys"),
            ("app.kubernetes.io/*", "add single keys"),
            ("k8s.io/*", "add single keys"),
            ("scheduling.k8s.io/*", "add single keys"),
        ] {
            let error = AllowList::with(&[entry]).err().unwrap_or_default();
            assert_eq!(error.is_empty(), expected.is_empty(), "{entry}: {error}");
            assert!(error.contains(expected), "{entry}: {error}");
        }
        let many: Vec<String> = (0..=MOST_ADDED).map(|i| format!("key{i}")).collect();
        AllowList::with(&many[1..]).expect("the maximum is allowed");
        assert!(AllowList::with(&many).expect_err("too many").contains("At most 64"));
    }
}

//! Which labels and annotations users may set on token Secrets (`docs/adr/0001-allow-list-for-secret-metadata.md`).

use std::collections::BTreeSet;

use crate::api::metadata::{ALLOWED_SECRET_METADATA, is_operators_own};
use crate::domain::validate::is_qualified;

/// Most entries that the platform team can add: the chart's admission policy compares every key with all of them, and the
/// API server bounds what an expression may cost.
pub const MOST_ADDED: usize = 64;

/// The keys that are allowed, and prefixes as `PREFIX/*`.
#[derive(Clone, Debug)]
pub struct AllowList(BTreeSet<String>);

impl Default for AllowList {
    fn default() -> Self {
        Self(ALLOWED_SECRET_METADATA.map(str::to_owned).into())
    }
}

impl AllowList {
    /// The defaults and what the platform team adds, or a sentence about an entry that cannot be added.
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
    // A prefix is well-formed if a key with it is.
    let key = prefix.map_or_else(|| entry.to_owned(), |prefix| format!("{prefix}/x"));
    if !is_qualified(&key) {
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
    fn the_defaults_are_such_as_could_be_added() {
        AllowList::with(&ALLOWED_SECRET_METADATA).expect("well-formed");
    }

    #[test]
    fn what_is_added_is_well_formed_and_takes_nothing_of_the_operator_and_of_kubernetes() {
        for (entry, said) in [
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
            let told = AllowList::with(&[entry]).err().unwrap_or_default();
            assert_eq!(told.is_empty(), said.is_empty(), "{entry}: {told}");
            assert!(told.contains(said), "{entry}: {told}");
        }
        let many: Vec<String> = (0..=MOST_ADDED).map(|i| format!("key{i}")).collect();
        AllowList::with(&many[1..]).expect("as many as fit");
        assert!(AllowList::with(&many).expect_err("one more").contains("At most 64"));
    }
}

//! Who in the cluster refused a write: of the API server's words only the name of a policy, webhook or quota.

use std::fmt;

/// What refused a write. Its name is one that Kubernetes takes, and nothing else of the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refuser {
    kind: &'static str,
    name: String,
}

/// What stands before the name, after it, and what it names.
const FORMS: [(&str, &str, &str); 3] = [
    ("ValidatingAdmissionPolicy '", "'", "ValidatingAdmissionPolicy"),
    ("admission webhook \"", "\"", "admission webhook"),
    ("exceeded quota: ", ",", "ResourceQuota"),
];

impl Refuser {
    /// From the message of a refused write.
    #[must_use]
    pub fn of(message: &str) -> Option<Self> {
        // Built-in admission plugins name the object first.
        let told = message.split_once(" is forbidden: ").map_or(message, |(_, told)| told);
        FORMS.iter().find_map(|(before, after, kind)| {
            let (name, _) = told.strip_prefix(before)?.split_once(after)?;
            let is_name = !name.is_empty()
                && name.len() <= 253
                && name
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b));
            is_name.then(|| Self {
                kind,
                name: name.to_owned(),
            })
        })
    }
}

impl fmt::Display for Refuser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.kind, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_name_of_what_refused_is_taken() {
        let table = [
            (
                r#"secrets "s" is forbidden: ValidatingAdmissionPolicy 'zitadel-tokens' with binding 'b' denied request: no"#,
                Some("ValidatingAdmissionPolicy `zitadel-tokens`"),
            ),
            (
                "ValidatingAdmissionPolicy 'a.b' with binding 'b' denied request: no",
                Some("ValidatingAdmissionPolicy `a.b`"),
            ),
            (
                r#"admission webhook "x.example.com" denied the request: no"#,
                Some("admission webhook `x.example.com`"),
            ),
            (
                r#"secrets "s" is forbidden: exceeded quota: none-more, requested: count/secrets=1"#,
                Some("ResourceQuota `none-more`"),
            ),
            (r#"secrets "s" is forbidden: User "u" cannot create resource"#, None),
            ("ValidatingAdmissionPolicy 'A token: eyJ' with binding", None),
            ("ValidatingAdmissionPolicy '' with", None),
            (r#"admission webhook "unfinished"#, None),
            ("no ValidatingAdmissionPolicy 'x' here", None),
            ("", None),
        ];
        for (message, expected) in table {
            assert_eq!(
                Refuser::of(message).map(|r| r.to_string()).as_deref(),
                expected,
                "{message}"
            );
        }
    }
}

//! The policy, webhook or quota that refused a write. Only its name is taken from the API server's message.

use std::fmt;

/// The policy, webhook or quota that refused a write. The name has the syntax of a Kubernetes name, so that no other
/// text of the message gets through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refuser {
    kind: &'static str,
    name: String,
}

/// The text before the name, the text after it, and the kind that the name belongs to.
const FORMS: [(&str, &str, &str); 3] = [
    ("ValidatingAdmissionPolicy '", "'", "ValidatingAdmissionPolicy"),
    ("admission webhook \"", "\"", "admission webhook"),
    ("exceeded quota: ", ",", "ResourceQuota"),
];

impl Refuser {
    /// Finds the refuser in the API server's message.
    #[must_use]
    pub fn of(message: &str) -> Option<Self> {
        // Messages of built-in admission plugins start with the object.
        let rest = message.split_once(" is forbidden: ").map_or(message, |(_, rest)| rest);
        FORMS.iter().find_map(|(before, after, kind)| {
            let (name, _) = rest.strip_prefix(before)?.split_once(after)?;
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
    fn only_the_name_is_taken_from_the_message() {
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

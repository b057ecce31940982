//! The labels and annotations that we write and read, and the one place that names the API group.

/// API group of our kinds, and prefix of every label and annotation of ours.
pub const GROUP: &str = "zitadel-tokens.dev";

/// Field manager of our server-side applies, and value of the `managed-by` label.
pub const MANAGER: &str = "zitadel-tokens";

/// Recommended Kubernetes label: which tool manages an object.
pub const LABEL_MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// Label of a token Secret: the name of the `ZitadelServiceUser` that it belongs to.
pub const LABEL_SERVICE_USER: &str = "zitadel-tokens.dev/service-user";

/// Annotation of a token Secret: what was minted, from what, until when (the domain's `Record` as JSON).
pub const ANNOTATION_RECORD: &str = "zitadel-tokens.dev/record";

/// Annotation of a `ZitadelServiceUser`: an opaque value; a value not served yet asks for new tokens.
pub const ANNOTATION_RENEW_REQUEST: &str = "zitadel-tokens.dev/renew-request";

/// Annotation of a foreign Secret: the name of the `ZitadelServiceUser` that may take it over.
pub const ANNOTATION_ADOPT: &str = "zitadel-tokens.dev/adopt";

/// Labels and annotations that users may set on a token Secret; `PREFIX/*` stands for all keys with that prefix. The
/// platform team can add more. Why these, and why not a list of what is denied:
/// `docs/adr/0001-allow-list-for-secret-metadata.md`.
pub const ALLOWED_SECRET_METADATA: [&str; 5] = [
    "app.kubernetes.io/component",
    "app.kubernetes.io/name",
    "app.kubernetes.io/part-of",
    "app.kubernetes.io/version",
    "reloader.stakater.com/*",
];

/// A Kubernetes name, as a pattern: lower-case labels with dots between.
pub(crate) const NAME_PATTERN: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";

/// An id of ZITADEL, as a pattern.
pub(crate) const ID_PATTERN: &str = r"^[a-zA-Z0-9_-]+$";

/// A duration, as a pattern.
pub(crate) const DURATION_PATTERN: &str = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$";

/// Whether no user may ever set `key` on a token Secret, whatever the platform team allows: the operator sets it.
#[must_use]
pub fn is_operators_own(key: &str) -> bool {
    let of_group = |(prefix, _): (&str, &str)| {
        prefix
            .strip_suffix(GROUP)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    key == LABEL_MANAGED_BY || key.split_once('/').is_some_and(of_group)
}

/// Whether `key` (of a label or annotation) is of ours.
#[must_use]
pub fn is_ours(key: &str) -> bool {
    key.strip_prefix(GROUP).is_some_and(|rest| rest.starts_with('/'))
}

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

/// Keys whose prefix is or ends in one of these make other controllers act, so that users may not set them on a
/// token Secret (design §2.2): a token Secret must not become a service-account token, an Argo CD cluster or a copy
/// in another namespace.
pub const RESERVED_PREFIXES: [&str; 9] = [
    "zitadel-tokens.dev",
    "kubernetes.io",
    "k8s.io",
    "argoproj.io",
    "fluxcd.io",
    "mittwald.de",
    "emberstack.com",
    "cert-manager.io",
    "bitnami.com",
];

/// A Kubernetes name, as a pattern: lower-case labels with dots between.
pub(crate) const NAME_PATTERN: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";

/// An id of ZITADEL, as a pattern.
pub(crate) const ID_PATTERN: &str = r"^[a-zA-Z0-9_-]+$";

/// A duration, as a pattern.
pub(crate) const DURATION_PATTERN: &str = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$";

/// Whether `key` (of a label or annotation) is of ours.
#[must_use]
pub fn is_ours(key: &str) -> bool {
    key.strip_prefix(GROUP).is_some_and(|rest| rest.starts_with('/'))
}

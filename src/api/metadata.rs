//! Labels and annotations that the operator writes and reads, and the name of the API group.

/// API group of the operator's kinds, and prefix of its labels and annotations.
pub const GROUP: &str = "zitadel-tokens.dev";

/// Field manager of the operator's server-side applies, and value of the label `managed-by`.
pub const MANAGER: &str = "zitadel-tokens";

/// Recommended Kubernetes label: the tool that manages an object.
pub const LABEL_MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// Label of a token Secret: the name of the `ZitadelServiceUser` that it belongs to.
pub const LABEL_SERVICE_USER: &str = "zitadel-tokens.dev/service-user";

/// Annotation of a token Secret: the domain's `Record` as JSON, which states what the token was requested with and when
/// it expires.
pub const ANNOTATION_RECORD: &str = "zitadel-tokens.dev/record";

/// Annotation of a `ZitadelServiceUser`: an opaque value. A new value requests a refresh of every token.
pub const ANNOTATION_RENEW_REQUEST: &str = "zitadel-tokens.dev/renew-request";

/// Annotation of a `ZitadelServiceUser` or a `ZitadelInstance`: an opaque value. A new value requests a rotation of the key,
/// of an instance that of its administrator.
pub const ANNOTATION_ROTATE_REQUEST: &str = "zitadel-tokens.dev/rotate-request";

/// Annotation of a `ZitadelServiceUser`: its UID. The operator then gives up the keys and the user that it made for the
/// object, and leaves them at ZITADEL.
pub const ANNOTATION_ABANDON: &str = "zitadel-tokens.dev/abandon";

/// Annotation of the Secret with an admin credential: the name of the `ZitadelInstance` that may use it.
pub const ANNOTATION_INSTANCE: &str = "zitadel-tokens.dev/instance";

/// Annotation of the Secret with an admin credential: the destination that it may be sent to.
pub const ANNOTATION_SEND_TO: &str = "zitadel-tokens.dev/send-to";

/// Metadata key of a user that the operator created in ZITADEL: cluster, namespace and name of the object.
pub const METADATA_OWNER: &str = "zitadel-tokens.dev/owner";

/// Finalizer of a `ZitadelServiceUser` for which the operator has made keys at ZITADEL.
pub const KEYS_FINALIZER: &str = "zitadel-tokens.dev/keys";

/// Label of a key ledger. The value is the UID of its `ZitadelServiceUser`, or the name of its `ZitadelInstance`.
pub const LABEL_KEY_LEDGER: &str = "zitadel-tokens.dev/key-ledger";

/// Prefix of the name of a key ledger, before the UID of its `ZitadelServiceUser`.
pub const KEY_LEDGER_PREFIX: &str = "service-user-key-";

/// Prefix of the name of the key ledger of an administrator, before the name of its `ZitadelInstance`.
pub const ADMIN_LEDGER_PREFIX: &str = "admin-key-";

/// Finalizer of a `ZitadelServiceUser` for which the operator has granted manager roles.
pub const ROLES_FINALIZER: &str = "zitadel-tokens.dev/manager-roles";

/// Label of a role ledger. The value is the UID of its `ZitadelServiceUser`.
pub const LABEL_ROLE_LEDGER: &str = "zitadel-tokens.dev/role-ledger";

/// Prefix of the name of a role ledger, before the UID of its `ZitadelServiceUser`.
pub const ROLE_LEDGER_PREFIX: &str = "service-user-roles-";

/// Annotation of an existing Secret: the name of the `ZitadelServiceUser` that may adopt it.
pub const ANNOTATION_ADOPT: &str = "zitadel-tokens.dev/adopt";

/// Annotation of the CRDs: the version of their schema ([`crate::api::SCHEMA_VERSION`]).
pub const ANNOTATION_SCHEMA_VERSION: &str = "zitadel-tokens.dev/schema-version";

/// Labels and annotations that users may set on a token Secret. `PREFIX/*` stands for all keys with that prefix. The
/// platform team can add more. `docs/adr/0001-allow-list-for-secret-metadata.md` explains the choice, and why this is
/// not a deny list.
pub const ALLOWED_SECRET_METADATA: [&str; 5] = [
    "app.kubernetes.io/component",
    "app.kubernetes.io/name",
    "app.kubernetes.io/part-of",
    "app.kubernetes.io/version",
    "reloader.stakater.com/*",
];

/// Whether `key` is reserved for the operator. Users cannot set it on a token Secret, whatever the platform team
/// allows.
#[must_use]
pub fn is_operators_own(key: &str) -> bool {
    let of_group = |(prefix, _): (&str, &str)| {
        prefix
            .strip_suffix(GROUP)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    key == LABEL_MANAGED_BY || key.split_once('/').is_some_and(of_group)
}

/// Whether `key` (of a label or annotation) has the prefix of the operator's API group.
#[must_use]
pub fn is_ours(key: &str) -> bool {
    key.strip_prefix(GROUP).is_some_and(|rest| rest.starts_with('/'))
}

//! Patterns and messages that the schema and the operator share (`domain/validate.rs`).

/// A Kubernetes name: DNS labels with dots between.
pub const NAME_PATTERN: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";

/// An id of ZITADEL.
pub const ID_PATTERN: &str = r"^[a-zA-Z0-9_-]+$";

/// A duration.
pub const DURATION_PATTERN: &str = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$";

/// A further scope. Audiences are not among them: they would bypass the access policies.
pub const SCOPE_PATTERN: &str = r"^(openid|profile|email|phone|address|urn:zitadel:iam:user:metadata|urn:zitadel:iam:user:resourceowner|urn:zitadel:iam:org:project:role:[a-zA-Z0-9_.:-]+|urn:zitadel:iam:org:roles:id:[a-zA-Z0-9_-]+|urn:zitadel:iam:org:domain:primary:[a-zA-Z0-9.-]+)$";

/// Key of a label or annotation. Kubernetes also accepts annotation prefixes in upper case, which would bypass the rules
/// on prefixes.
pub const METADATA_KEY_PATTERN: &str = "^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";

/// Value of a label.
pub const LABEL_VALUE_PATTERN: &str = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$";

/// Key of a Secret's data.
pub const DATA_KEY_PATTERN: &str = "^[-._a-zA-Z0-9]{1,253}$";

/// Data keys that the operator sets.
pub const OPERATORS_DATA: [&str; 4] = ["token", "token_type", "expires_at", "issuer"];

/// Longest Kubernetes name.
pub const MAX_NAME: usize = 253;

/// Name of a token.
pub const TOKEN_NAME_PATTERN: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";

/// A username in ZITADEL.
pub const USERNAME_PATTERN: &str = "^[a-zA-Z0-9]([a-zA-Z0-9._@+-]*[a-zA-Z0-9])?$";

/// A pattern for usernames: `*` stands for any characters.
pub const USERNAME_PATTERN_PATTERN: &str = "^[a-zA-Z0-9._@+*-]+$";

/// Longest username.
pub const MAX_USERNAME: usize = 200;

/// Message: both or none of the two sources of a key.
pub const KEY_OR_USER: &str = "set exactly one of keySecretRef and user";

/// Message: a name for a user that has one.
pub const NAME_OF_EXISTING: &str = "cannot be combined with existingUserID, because that user has a username";

/// A manager role of ZITADEL.
pub const ROLE_PATTERN: &str = "^(IAM|ORG|PROJECT)_[A-Z0-9_]{1,60}$";

/// Most entries with manager roles of an object.
pub const MAX_MANAGER_ROLES: usize = 16;

/// Most roles of such an entry.
pub const MAX_ROLES: usize = 16;

/// Message: a scope of manager roles that is not exactly one.
pub const ROLE_SCOPE: &str = "set exactly one of instance: true, organizationID and projectID";

/// Message: a project grant without its project.
pub const GRANT_WITHOUT_PROJECT: &str = "also set projectID, the project that is granted to this organization";

/// Message: a role of another level.
pub const ROLE_LEVEL: &str = "roles of the instance begin with IAM_, of an organization with ORG_, of a project with PROJECT_, of a project grant with PROJECT_GRANT_";

/// Message: two entries with one scope.
pub const ROLE_SCOPE_TWICE: &str = "list each instance, organization, project and project grant only once";

/// Scheme, lowercase host, and an optional port up to 65535.
pub const ORIGIN_PATTERN: &str = r"^https?://[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?$";

/// Longest name of a token.
pub const MAX_TOKEN_NAME: usize = 63;

/// Most project ids of a token.
pub const MAX_PROJECTS: usize = 32;

/// Message: an interval outside its bounds.
pub const ROTATION_INTERVAL: &str = "must be at least 1h and at most 8760h";

/// Message: an overlap outside its bounds.
pub const ROTATION_OVERLAP: &str = "must be at least 10s and shorter than interval";

/// Message: a key that would expire before the next one replaces it.
pub const ROTATION_LIFETIME: &str = "must be longer than interval and overlap together, and at most 26280h";

/// Most further scopes of a token.
pub const MAX_SCOPES: usize = 16;

/// Most templates of a token.
pub const MAX_TEMPLATES: usize = 32;

/// Longest id of ZITADEL.
pub const MAX_ID: usize = 64;

/// Longest scope.
pub const MAX_SCOPE: usize = 256;

/// The alias of the ZITADEL API's project. It is no project id.
pub const ZITADEL_ALIAS: &str = "zitadel";

/// Bytes of all templates of an object together, keys included; of all labels of its Secrets; and of all annotations. The
/// operator holds an object in memory during a reconcile, and 16 tokens with 32 templates each could otherwise have 8 MiB.
pub const MAX_TEXT: usize = 64 * 1024;

/// Placeholders of a template. Each becomes a token of up to 32 KiB (`domain/answer.rs`).
pub const MAX_PLACEHOLDERS: usize = 16;

/// Message: a token without audience.
pub const NO_AUDIENCE: &str = "name at least one audience, in projectIDs or with zitadelAPI: true";

/// Message: the alias among the project ids.
pub const ALIAS: &str = "`zitadel` means the ZITADEL API; to request its audience, set zitadelAPI: true";

/// Message: the key Secret as token Secret.
pub const KEY_OVERWRITTEN: &str =
    "must differ from spec.keySecretRef.name; otherwise the token would overwrite the key";

/// Message: one Secret for two tokens.
pub const SECRET_NAMED_TWICE: &str = "two tokens name the same Secret; use a separate Secret for each token";

/// Message: the form of a label or annotation key.
pub const METADATA_KEY: &str =
    "a key must be a name of at most 63 characters, optionally preceded by a lowercase DNS name and /";

/// Message: a label or annotation key that the operator sets.
pub const OPERATORS_OWN: &str =
    "keys of zitadel-tokens.dev and app.kubernetes.io/managed-by are reserved for the operator; remove them";

/// Message: the form of a label's value.
pub const LABEL_VALUE: &str =
    "a value must have at most 63 characters of A-Z a-z 0-9 - _ . and begin and end with a letter or digit";

/// Message: a template for a data key that cannot be.
pub const DATA_KEY: &str = "a data key must have 1 to 253 characters of A-Z a-z 0-9 - _ . and must not be `.`, start with `..` or be one of token, token_type, expires_at, issuer";

/// Message: more than [`MAX_TEXT`].
pub const TOO_MUCH_TEXT: &str = "all tokens together must have at most 64 KiB; shorten or remove entries";

/// Message: more than [`MAX_PLACEHOLDERS`].
pub const TOO_MANY_PLACEHOLDERS: &str = "a value must have at most 16 placeholders, counted by {{";

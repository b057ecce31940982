//! The closed set of reasons: the result of an attempt, its meaning, its remedy, and how the operator retries.
//! `make generate` writes `docs/reasons.md` from this table.

use crate::domain::retry::Retry;

/// The object that a failure concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// This object or its Secrets.
    Object,
    /// The key, or the user that it belongs to. The condition `KeyValid` becomes false.
    Key,
    /// The instance itself, not a single request. The operator reconciles the instance again.
    Instance,
}

macro_rules! reasons {
    ($($name:ident: $retry:ident, $subject:ident, $meaning:literal, $remedy:literal;)*) => {
        /// Why a token is in its state. `status` and Events show the name of the reason.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(clippy::doc_markdown, reason = "users read these texts as plain text, not as Markdown")]
        pub enum Reason {
            $(#[doc = $meaning] $name,)*
        }

        impl Reason {
            /// All reasons, in the order of the documentation.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name that users see.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// The reason with this name.
            #[must_use]
            pub fn named(name: &str) -> Option<Self> {
                match name { $(stringify!($name) => Some(Self::$name),)* _ => None }
            }

            /// How the operator retries after this reason.
            #[must_use]
            pub fn retry(self) -> Retry {
                match self { $(Self::$name => Retry::$retry,)* }
            }

            /// The object that the reason concerns.
            #[must_use]
            pub fn subject(self) -> Subject {
                match self { $(Self::$name => Subject::$subject,)* }
            }

            /// The meaning, in complete sentences.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => $meaning,)* }
            }

            /// The remedy, in complete sentences.
            #[must_use]
            pub fn remedy(self) -> &'static str {
                match self { $(Self::$name => $remedy,)* }
            }
        }
    };
}

reasons! {
    Issued: No, Object,
        "The Secret holds a valid token.",
        "No action needed.";
    Suspended: No, Object,
        "The object or its ZitadelInstance is suspended: the operator changes nothing and requests no tokens. If only the object is suspended, it still revokes manager roles that no policy allows.",
        "To resume, set spec.suspend to false or remove it, in both objects.";
    InvalidSpec: Permanent, Object,
        "A field violates a schema rule of this operator version, or sets a label or annotation key that the platform team does not allow.",
        "Correct the field that the message names.";
    ObjectUnreadable: Permanent, Object,
        "The operator ignores the object: it does not match the CRDs of this operator version, or its spec is larger than 256 KiB.",
        "Apply the CRDs of the operator's version, then apply the object again. If the spec is larger than 256 KiB, shorten it.";
    InstanceReady: No, Object,
        "The server's discovery document is available and states the issuer of the ZitadelInstance.",
        "No action needed.";
    InstanceMissing: Permanent, Object,
        "The ZitadelInstance in spec.instanceRef does not exist.",
        "Create the ZitadelInstance, or correct spec.instanceRef.name.";
    InstanceInvalid: Permanent, Object,
        "The ZitadelInstance in spec.instanceRef does not match the CRD of this operator version, so the operator does not use it.",
        "Ask the platform team to apply the CRDs of the operator's version, then the ZitadelInstance again.";
    NamespaceMissing: Transient, Object,
        "The operator has not yet read the labels of the object's namespace.",
        "No action needed: the operator retries when it has read the namespace.";
    NamespaceLabelsTooLarge: Permanent, Object,
        "The labels of the object's namespace are larger than 8 KiB, so the operator matches no namespace selector against them.",
        "Remove labels from the namespace.";
    NamespaceLimit: Permanent, Object,
        "The namespace has reached its memory limit in the operator, so the operator does not serve this service user.",
        "Remove unused service users, tokens or Secrets with the label zitadel-tokens.dev/service-user, or ask the platform team to raise --namespace-memory.";
    RequestsThrottled: Transient, Object,
        "The object, or all objects of its namespace together, requested too many tokens in addition to the scheduled refreshes. Each new object, each change of an audience, scope or key, and each lost Secret requires a token.",
        "Find the client that repeatedly creates or changes these objects. If there is none, no action is needed: the operator requests the token when the limit allows it.";
    KeyUsable: No, Object,
        "The key is readable and unexpired, and ZITADEL has not rejected it.",
        "No action needed.";
    KeyExpiresWithin30Days: No, Key,
        "The key is usable. It expires within 30 days, and the operator does not rotate it.",
        "With spec.keyRotation, fix what the condition KeyRotated reports. Otherwise create a new key in ZITADEL and replace the content of the Secret, or set spec.keyRotation.";
    KeyExpiresWithin7Days: No, Key,
        "The key is usable. It expires within seven days, and the operator does not rotate it. After that, no token is refreshed.",
        "With spec.keyRotation, fix what the condition KeyRotated reports. Otherwise create a new key in ZITADEL and replace the content of the Secret, or set spec.keyRotation.";
    OperatorNamespace: Permanent, Object,
        "The operator does not serve service users in its own namespace, because that namespace holds other keys.",
        "Move the object to the namespace of its workload.";
    AccessDenied: Permanent, Object,
        "No ZitadelAccessPolicy of the instance allows this namespace all audiences of the token.",
        "Ask the platform team for a ZitadelAccessPolicy, or remove the audience from the token.";
    SecretsForbidden: Transient, Object,
        "The operator is not allowed to read Secrets in this namespace.",
        "Grant the operator's service account the permissions that docs/install.md lists for the namespace.";
    KeySecretMissing: Permanent, Key,
        "The Secret that spec.keySecretRef names does not exist.",
        "Create the Secret with ZITADEL's key file in the object's namespace, or correct spec.keySecretRef.name.";
    KeyEntryMissing: Permanent, Key,
        "The Secret that spec.keySecretRef names does not have the entry in spec.keySecretRef.key, or is empty.",
        "Store ZITADEL's key file in the Secret under that name, or correct spec.keySecretRef.key.";
    KeyEntryAmbiguous: Permanent, Key,
        "The Secret that spec.keySecretRef names has several entries, and spec.keySecretRef.key is not set.",
        "Set spec.keySecretRef.key to the name of the entry that holds the key file.";
    KeyIsTokenSecret: Permanent, Key,
        "The Secret that spec.keySecretRef names has labels of the operator: it is reserved for a token and cannot hold a key.",
        "Store ZITADEL's key file in a separate Secret without labels of zitadel-tokens.dev.";
    KeyTooLarge: Permanent, Key,
        "The entry that spec.keySecretRef names is larger than 64 KiB; a key file has about 2 kB.",
        "Replace the entry with the JSON key file from ZITADEL, and nothing else.";
    KeyNotJSON: Permanent, Key,
        "The entry that spec.keySecretRef names is not a JSON object: it is another file, truncated, or encoded twice.",
        "Replace the entry with the JSON key file from ZITADEL, complete and unchanged.";
    KeyFieldInvalid: Permanent, Key,
        "A field of the key file is missing or has a value that ZITADEL does not write.",
        "Use the key file unchanged. It has the string fields keyId, key and userId, and optionally type and expirationDate (RFC 3339).";
    KeyTypeUnknown: Permanent, Key,
        "The field type of the key file is neither serviceaccount nor application.",
        "Create a key of type JSON for the service user in ZITADEL, and store that file unchanged in the Secret.";
    KeyIsApplicationKey: Permanent, Key,
        "The key belongs to an application, not to a service user.",
        "Create a key for the service user in ZITADEL (its type is serviceaccount), and store that file in the Secret.";
    KeyPEMInvalid: Permanent, Key,
        "The field key of the key file is not an RSA private key in PEM (PKCS#1 or PKCS#8).",
        "Use the key file as ZITADEL wrote it, with line breaks in the field key written as \\n.";
    KeyTooShort: Permanent, Key,
        "The RSA key is shorter than 2048 bits, so the operator does not sign with it.",
        "Set MachineKeySize in ZITADEL to 2048 or more, create a new key, and store its file in the Secret.";
    KeyExpired: Permanent, Key,
        "The expiration date of the key has passed.",
        "Create a new key in ZITADEL and replace the content of the Secret.";
    KeyRejected: Eventual, Key,
        "ZITADEL rejected the assertion signed with this key, or failed to process it: up to v4.13 ZITADEL returns the same error when an Action throws.",
        "Check that the key still exists in ZITADEL for this user and belongs to this instance. If not, create a new key; with spec.user, the operator does that within about half an hour. If it does, check ZITADEL's log and its Actions.";
    KeyRotationOnSchedule: No, Object,
        "The operator rotates the key on schedule.",
        "No action needed.";
    KeyRotationInProgress: Transient, Object,
        "A rotation of the key has begun and is not finished. Tokens are requested with the key before it.",
        "No action needed.";
    KeyRotationInvalid: Permanent, Object,
        "keyRotation in the spec violates a rule: overlap must be shorter than interval, and keyLifetime longer than both together.",
        "Correct keyRotation.";
    KeyManagementUnavailable: Rare, Object,
        "The server has no API for keys of the user itself, which ZITADEL has since version 4. The operator does not rotate the key.",
        "Upgrade ZITADEL, or remove keyRotation from the spec and rotate the key yourself.";
    KeyManagementForbidden: Rare, Object,
        "ZITADEL refuses to let the service user manage its own keys. The operator does not rotate the key.",
        "Allow it in ZITADEL, or remove keyRotation from the spec and rotate the key yourself. With spec.user, give the administrator a role that manages the user.";
    NewKeyRejected: Eventual, Object,
        "ZITADEL rejects token requests with the new key. The operator keeps the key before it, and replaces the new key after ten minutes.",
        "If this persists, check ZITADEL's log and its Actions.";
    KeyListIncomplete: Rare, Object,
        "ZITADEL's list of the user's keys or personal access tokens has 1000 entries or more, or lacks the key that the operator signs with. The operator removes no key.",
        "Remove unused keys and personal access tokens of the user in ZITADEL.";
    BootstrapKeyInUse: Permanent, Object,
        "The operator does not remove the bootstrap key at ZITADEL, because another ZitadelServiceUser or the administrator of a ZitadelInstance uses it too, or because the admin credential of a ZitadelInstance cannot be read.",
        "Create a key for each of them and repair spec.adminCredential of each ZitadelInstance, or set keyRotation.deleteBootstrapKey to false.";
    BootstrapKeyNeeded: Permanent, Object,
        "keyRotation was removed from the spec, and the Secret that the spec names has no key that can take over. The operator keeps using its last key until that key expires.",
        "Create a key in ZITADEL and store its file in the Secret, or set keyRotation again.";
    OldKeysRemain: Permanent, Object,
        "The key now belongs to another user or issuer, and the operator could not remove the keys that it made for the former one.",
        "Make the former user and ZitadelInstance available. Or leave the keys at ZITADEL: annotate the ZitadelServiceUser with zitadel-tokens.dev/abandon: <its UID>, or delete the Secret admin-key-<name of the ZitadelInstance> in the operator's namespace.";
    KeyLedgerInvalid: Permanent, Object,
        "The Secret in which the operator keeps its keys was edited or damaged: service-user-key-<UID of the object> or, for an administrator, admin-key-<name of the ZitadelInstance>, in the operator's namespace. The operator does not rotate the key, and uses the key in the Secret that the spec names. With spec.user, it requests no token.",
        "Restore the Secret from a backup. If there is none, delete it: the operator then starts again with the key in the Secret that the spec names, if that still works, and the keys that it made before stay at ZITADEL until they expire. With spec.user, UserConflict follows: read docs/managed-users.md first.";
    LedgerWriteFailed: Transient, Object,
        "The Kubernetes API server refuses to write the Secret in which the operator keeps its keys of the user, or the roles that it granted, or refuses the finalizer of the object.",
        "Check that the operator's namespace exists, and check quotas, admission policies and the operator's permissions there and on service users.";
    LedgerUnavailable: Permanent, Object,
        "The operator does not know its own namespace, or is not allowed to read the Secrets there in which it keeps its keys and the roles that it granted.",
        "Start the operator with --namespace, and grant it the permissions that docs/install.md lists.";
    KeyLost: No, Object,
        "ZITADEL no longer accepts the key that the operator made. The operator signs with an older key and replaces the lost one.",
        "If the key was removed, find out in ZITADEL who removed it.";
    BootstrapKeyRemoved: No, Object,
        "The operator removed the bootstrap key at ZITADEL, as keyRotation.deleteBootstrapKey in the spec asks.",
        "No action needed. The Secret in spec.keySecretRef of a ZitadelServiceUser may be deleted, but not the one in spec.adminCredential of a ZitadelInstance.";
    KeysLeftBehind: No, Object,
        "Keys that the operator made stay at ZITADEL: the object was deleted, or the annotation zitadel-tokens.dev/abandon asks for it, or ZITADEL accepts none of them.",
        "Remove them in ZITADEL, or wait until they expire.";
    ForeignCredentials: No, Object,
        "Between the last two counts, the number of the user's keys and personal access tokens that the operator did not make has grown. The holder of such a credential can act as the user, and can add more.",
        "Check the keys and personal access tokens of the user in ZITADEL, and remove those that nobody needs.";
    NoForeignCredentials: No, Object,
        "Between the last two counts, the number of the user's keys and personal access tokens that the operator did not make has not grown.",
        "No action needed.";
    UserReady: No, Object,
        "The service user exists in ZITADEL as spec.user describes it.",
        "No action needed.";
    UserNotReady: Transient, Key,
        "The operator has not yet created the service user in spec.user, or has no key of it that works.",
        "On tokens and roles, the condition UserReady says why. If it lasts longer than half an hour, check the administrator in spec.adminCredential and the user in ZITADEL.";
    UserDenied: Permanent, Object,
        "No ZitadelAccessPolicy of the instance lets the operator create or take over this service user for the namespace.",
        "Ask the platform team for a ZitadelAccessPolicy with users.organizationIDs and, for a username other than the default, users.usernamePattern.";
    UserConflict: Eventual, Object,
        "ZITADEL has a user with this username already, or the metadata of the user names another owner. The operator takes over no user by its name.",
        "If the user is the operator's, restore its metadata zitadel-tokens.dev/owner to <cluster>/<namespace>/<name>. Otherwise set another spec.user.username, or spec.user.existingUserID, in a new object, or remove the user in ZITADEL.";
    UserNotAdoptable: Eventual, Object,
        "The operator does not take over the user in spec.user.existingUserID: it does not exist, is a human or the administrator, belongs to another organization, has roles of the instance, or its metadata zitadel-tokens.dev/owner does not name this object.",
        "Check the ID, and have a manager of the organization set the metadata zitadel-tokens.dev/owner of the user to <cluster>/<namespace>/<name> of this object.";
    UserRejected: Permanent, Object,
        "ZITADEL rejects the service user in spec.user: the organization does not exist, or a value is not accepted.",
        "Correct spec.user.organizationID, spec.user.username and the other fields of spec.user.";
    UserMissing: Permanent, Object,
        "The service user no longer exists in ZITADEL.",
        "Find out in ZITADEL who deleted it. To have a new user created, delete the object and create it again without existingUserID.";
    UserLeftBehind: No, Object,
        "A service user of the operator stays in ZITADEL: the object asks for it, or the metadata of the user names another owner.",
        "Remove the user in ZITADEL, if nobody needs it.";
    ManagerRolesGranted: No, Object,
        "The user has the roles in spec.managerRoles in ZITADEL.",
        "No action needed.";
    ManagerRolesDenied: Permanent, Object,
        "No ZitadelAccessPolicy of the instance allows this namespace all roles in spec.managerRoles. The operator grants only those that are allowed.",
        "Ask the platform team for a ZitadelAccessPolicy with managerRoles, or remove the roles from spec.managerRoles.";
    PrivilegedRolesDenied: Permanent, Object,
        "With this role, the user could act as a user with roles of the instance, as the administrator in spec.adminCredential, or as any user who logs in to ZITADEL's console. Or that administrator may not list the users with roles of the instance.",
        "Grant the role in another organization or project. Or ask the platform team for a ZitadelAccessPolicy with managerRoles[].allowPrivileged, or for IAM_OWNER_VIEWER for that administrator. To find out where roles are privileged, the operator needs ZITADEL 4.6.";
    UserIsAdministrator: Permanent, Object,
        "The key belongs to the administrator in spec.adminCredential of the ZitadelInstance, whose roles the operator does not change.",
        "Use a service user of its own for the workload.";
    ManagerRolesRejected: Permanent, Object,
        "ZITADEL rejects a role in spec.managerRoles: the organization, project or project grant does not exist, or the role does not.",
        "Correct the entry that the message names.";
    ManagerRolesNotShown: Transient, Object,
        "ZITADEL does not show yet that the roles of the user have changed.",
        "No action needed, unless it persists: then the administrator in spec.adminCredential may not list these roles.";
    OldRolesRemain: Permanent, Object,
        "The user or the issuer changed, and the operator could not revoke the roles that it granted to the former user.",
        "Restore the former ZitadelInstance with its admin credential. Or have the platform team delete the Secret service-user-roles-<UID of the object> in the operator's namespace, which leaves the roles in ZITADEL.";
    RoleLedgerInvalid: Permanent, Object,
        "The Secret service-user-roles-<UID of the object> in the operator's namespace was edited or damaged. The operator neither grants nor revokes roles.",
        "Restore the Secret from a backup. If there is none, delete it and remove by hand the roles of the user that it should not have.";
    ClusterUnnamed: Permanent, Object,
        "The operator does not know the name of its cluster, which is part of the name and the metadata of each service user in spec.user.",
        "Start the operator with --cluster-name.";
    AdminCredentialReady: No, Object,
        "ZITADEL accepts the credential in spec.adminCredential. What its user may do is in status.adminCredential.roles.",
        "No action needed.";
    CredentialMissing: Permanent, Object,
        "The ZitadelInstance has no spec.adminCredential, the Secret or entry that it names does not exist in the operator's namespace, several entries exist and none is named, or the operator does not know its own namespace.",
        "Set spec.adminCredential of the ZitadelInstance, create the Secret in the operator's namespace, and start the operator with --namespace.";
    CredentialNotBound: Permanent, Object,
        "The annotations of the Secret in spec.adminCredential do not allow its use: they name another ZitadelInstance or another destination. Or the operator rotates the key, the destination changed, and the Secret no longer has the key that the rotation began with.",
        "Annotate the Secret with zitadel-tokens.dev/instance: <name of the ZitadelInstance> and zitadel-tokens.dev/send-to: <issuer>, or <endpoint> for <issuer>; then \" as <tlsServerName>\" and \" via <proxy>\" if spec.connection sets them. After a change of the destination, store the key file that the rotation began with.";
    CredentialInvalid: Permanent, Object,
        "The Secret in spec.adminCredential holds neither a key file of ZITADEL nor a personal access token.",
        "Store a key file (JSON) or a personal access token in it, and nothing else.";
    CredentialRejected: Eventual, Object,
        "ZITADEL rejects the credential in spec.adminCredential: it was removed or has expired, or its user is deactivated.",
        "Create a new key or personal access token for the administrator, and store it in the Secret.";
    KeyFileNeeded: Permanent, Object,
        "The Secret in spec.adminCredential holds a personal access token, with which the operator neither rotates keys of the administrator nor removes those that it has made.",
        "Store a key file (JSON) of the administrator in the Secret. To use a token, first remove spec.adminCredential.keyRotation, and replace the content when the Secret admin-key-<name of the ZitadelInstance> is gone.";
    AdminForbidden: Permanent, Object,
        "The user of spec.adminCredential lacks the manager role that this needs.",
        "Give it the role that docs/admin-credential.md lists for this.";
    NotSupportedByServer: Rare, Object,
        "The server lacks an API that this needs. ZITADEL has all of them since version 4.6.",
        "Upgrade ZITADEL.";
    UserInactive: Eventual, Key,
        "The service user is deactivated or locked in ZITADEL.",
        "Reactivate the service user in ZITADEL.";
    RequestRejected: Permanent, Object,
        "ZITADEL rejected the token request for a reason other than the key or the user.",
        "Check ZITADEL's log: an Action or Target may reject the token.";
    InstanceUnreachable: Transient, Instance,
        "The server is unreachable or did not respond in time.",
        "Check the server, the network and spec.connection of the ZitadelInstance.";
    CABundleUnusable: Transient, Instance,
        "The CA certificates in spec.connection of the ZitadelInstance are unusable: the ConfigMap, Secret or entry does not exist in the operator's namespace, or its content is not PEM.",
        "Correct caBundle, caConfigMapRef or caSecretRef of the ZitadelInstance. For a reference, the operator must also know its own namespace.";
    TLSFailure: Transient, Instance,
        "The operator cannot establish a trusted TLS connection to the server.",
        "Check the server's certificate and the CA that issued it.";
    ClockSkew: Transient, Instance,
        "The clocks of the server and the operator differ by more than five minutes, according to the Date header of the server's responses. The operator signs no assertions.",
        "Set the clock of the machine that is wrong, or fix the proxy that changes the Date header.";
    RateLimited: Transient, Object,
        "The server rejected the request because of a rate limit or quota.",
        "No immediate action needed: the operator retries later. If this persists, check the quota in ZITADEL.";
    ServerError: Transient, Instance,
        "The server returned an internal error.",
        "No immediate action needed: the operator retries. If this persists, check the server's log.";
    IssuerMismatch: Permanent, Instance,
        "The server's discovery document states a different issuer, or a token endpoint on a different host.",
        "Correct spec.issuer or spec.connection.endpoint of the ZitadelInstance.";
    ProjectIDMismatch: Permanent, Instance,
        "The ID of the server's ZITADEL project differs from spec.zitadelProjectID of the ZitadelInstance.",
        "Correct spec.zitadelProjectID, or check that spec.connection leads to the right server.";
    InsecureHTTP: Permanent, Object,
        "The ZitadelInstance uses plain HTTP without spec.connection.allowInsecureHTTP, for a host that is neither a loopback address nor *.svc, or through spec.connection.proxy.",
        "Use https:// in spec.issuer and spec.connection.endpoint. For localhost or an in-cluster Service without a proxy, set spec.connection.allowInsecureHTTP to true.";
    MalformedResponse: Transient, Instance,
        "The server's response violates the protocol.",
        "Check spec.connection of the ZitadelInstance and any proxy between the operator and the server.";
    TokenMismatch: Permanent, Object,
        "The issued token differs from the request in its issuer, user, audience or organization. The operator discarded it.",
        "Check spec.tokens[].organizationID and any proxy between the operator and the server.";
    LifetimeTooShort: Permanent, Object,
        "The server issues tokens with a lifetime of less than five seconds.",
        "Increase the access token lifetime in ZITADEL.";
    SecretConflict: Permanent, Object,
        "A Secret with this name already exists, and this object does not control it, or it is immutable or not of type Opaque. The operator did not change it.",
        "Choose another spec.tokens[].secret.name, or annotate the Secret with zitadel-tokens.dev/adopt.";
    SecretTooLarge: Permanent, Object,
        "The Secret would be larger than 128 KiB after template expansion.",
        "Shorten spec.tokens[].secret.template, or use {{ token }} fewer times; each use counts as 8 KiB.";
    SecretBeingReplaced: Transient, Object,
        "The Secret belongs to a deleted object of the same name and is waiting for garbage collection.",
        "No action needed.";
    SecretContested: Permanent, Object,
        "Another client keeps deleting or changing the Secret, or keeps requesting refreshes: the operator requested the token several times within ten minutes.",
        "Find that client, for example in the audit log of the API server, and stop it. Until then the operator retries slowly.";
    SecretWriteFailed: Transient, Object,
        "The Kubernetes API server refuses to write the Secret. Until it accepts the write, the operator requests no token and keeps a token that it has already requested.",
        "Check quotas, admission policies and the operator's permissions in the namespace.";
    SecretChanged: Soon, Object,
        "The Secret changed between the operator's read and its write.",
        "No action needed: the operator retries within seconds.";
    NotLeading: Transient, Object,
        "Another replica of the operator became the leader.",
        "No action needed.";
    APIServerUnavailable: Soon, Object,
        "The Kubernetes API server is unreachable, or the object changed in the meantime.",
        "No action needed: the operator retries within seconds.";
    Internal: Transient, Object,
        "The operator failed unexpectedly, or is not allowed to write the status.",
        "Check the operator's permissions. If they are complete, report a bug with the operator's log.";
}

impl Reason {
    /// Whether the failure persists until an input changes.
    #[must_use]
    pub fn is_permanent(self) -> bool {
        matches!(self.retry(), Retry::Permanent | Retry::Eventual | Retry::Rare)
    }

    /// Meaning and remedy, as conditions and Events show them.
    #[must_use]
    pub fn advice(self) -> String {
        format!("{} {}", self.meaning(), self.remedy())
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

//! The closed set of reasons: how an attempt ended, what it means, what mends it, and how it is retried.
//! `docs/reasons.md` is made from this table.

use crate::domain::retry::Retry;

/// What a failure is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// This object or its Secrets.
    Object,
    /// The key, or the user that it belongs to: the condition `KeyValid` is false.
    Key,
    /// The instance itself and not one request: the operator reconciles the instance again.
    Instance,
}

macro_rules! reasons {
    ($($name:ident: $retry:ident, $subject:ident, $meaning:literal, $remedy:literal;)*) => {
        /// Why a token is as it is. Shown in `status` and Events by its name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(clippy::doc_markdown, reason = "users read these texts, and not as Markdown")]
        pub enum Reason {
            $(#[doc = $meaning] $name,)*
        }

        impl Reason {
            /// All of them, in the order of the documentation.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name, as users see it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// The reason of this name.
            #[must_use]
            pub fn named(name: &str) -> Option<Self> {
                match name { $(stringify!($name) => Some(Self::$name),)* _ => None }
            }

            /// How it is tried again.
            #[must_use]
            pub fn retry(self) -> Retry {
                match self { $(Self::$name => Retry::$retry,)* }
            }

            /// What it is about.
            #[must_use]
            pub fn subject(self) -> Subject {
                match self { $(Self::$name => Subject::$subject,)* }
            }

            /// What it means, as a sentence.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => $meaning,)* }
            }

            /// What mends it, as a sentence.
            #[must_use]
            pub fn remedy(self) -> &'static str {
                match self { $(Self::$name => $remedy,)* }
            }
        }
    };
}

reasons! {
    Issued: No, Object,
        "A valid token is in the Secret.",
        "Nothing is to be done.";
    Suspended: No, Object,
        "The object is suspended; nothing is changed.",
        "Set spec.suspend to false or remove it.";
    InvalidSpec: Permanent, Object,
        "A field breaks a rule of the operator's schema, or has a key that the platform team does not allow.",
        "Correct the field that the message names.";
    ObjectUnreadable: Permanent, Object,
        "The object does not match the CRD of this operator version, or its spec is larger than 256 KiB, and it is not served.",
        "Apply the CRDs of the operator's version, then apply the object again.";
    InstanceReady: No, Object,
        "The server answers and names the issuer of the ZitadelInstance.",
        "Nothing is to be done.";
    InstanceMissing: Permanent, Object,
        "The ZitadelInstance of spec.instanceRef does not exist.",
        "Create it, or correct spec.instanceRef.name.";
    InstanceInvalid: Permanent, Object,
        "The ZitadelInstance of spec.instanceRef breaks a rule of its schema; nothing is asked of it.",
        "Ask the platform team to correct it; its condition Ready says what is wrong.";
    NamespaceMissing: Transient, Object,
        "The labels of the object's namespace are not known yet.",
        "Nothing is to be done; they arrive with the namespace.";
    NamespaceLabelsTooLarge: Permanent, Object,
        "The labels of the object's namespace have more than 8 KiB, so that no rule about labels is applied to them.",
        "Remove labels from the namespace.";
    NamespaceLimit: Permanent, Object,
        "The namespace has reached its memory limit in the operator, so this service user is not served.",
        "Remove service users, tokens or Secrets with the label zitadel-tokens.dev/service-user that are not needed, or ask the platform team to raise --namespace-memory.";
    RequestsThrottled: Transient, Object,
        "The object, or all objects of its namespace together, asked for too many tokens besides the scheduled refreshes. Each new object, each change of an audience, scope or key and each lost Secret asks for one.",
        "Find out what creates or changes them again and again. If nothing does, no action is needed: the operator requests the token when the limit allows.";
    KeyUsable: No, Object,
        "The key can be read, has not expired, and was not refused.",
        "Nothing is to be done.";
    OperatorNamespace: Permanent, Object,
        "Service users are not served in the operator's own namespace, where other keys live.",
        "Move the object to the namespace of its workload.";
    AccessDenied: Permanent, Object,
        "No ZitadelAccessPolicy of the instance allows this namespace all audiences of the token.",
        "Ask the platform team for a ZitadelAccessPolicy, or remove the audience from the token.";
    SecretsForbidden: Transient, Object,
        "The operator may not read Secrets in this namespace.",
        "Give the operator's service account the rights of docs/install.md in the namespace.";
    KeySecretMissing: Permanent, Key,
        "The Secret of spec.keySecretRef does not exist.",
        "Create it in the object's namespace with ZITADEL's key file, or correct spec.keySecretRef.name.";
    KeyEntryMissing: Permanent, Key,
        "The Secret of spec.keySecretRef has no entry of the name in spec.keySecretRef.key, or no entry at all.",
        "Put ZITADEL's key file into the Secret under that name, or correct spec.keySecretRef.key.";
    KeyEntryAmbiguous: Permanent, Key,
        "The Secret of spec.keySecretRef has several entries, and none of them is named.",
        "Name the entry with the key file in spec.keySecretRef.key.";
    KeyIsTokenSecret: Permanent, Key,
        "The Secret of spec.keySecretRef carries the operator's own labels: it is kept for tokens, not for a key.",
        "Put ZITADEL's key file into a Secret of its own, without labels of zitadel-tokens.dev.";
    KeyTooLarge: Permanent, Key,
        "The entry of spec.keySecretRef is larger than 64 KiB; a key file has about 2 kB.",
        "Put the JSON file that ZITADEL wrote for the key there, and nothing else.";
    KeyNotJSON: Permanent, Key,
        "The entry of spec.keySecretRef is not a JSON object: something else, cut off, or encoded twice.",
        "Put the JSON file that ZITADEL wrote for the key there, whole and unchanged.";
    KeyFieldInvalid: Permanent, Key,
        "A field of the key file is missing or is not what ZITADEL writes.",
        "Use the file unchanged: it has the texts keyId, key and userId, and may have type and expirationDate (RFC 3339).";
    KeyTypeUnknown: Permanent, Key,
        "The type in the key file is neither serviceaccount nor application.",
        "Make a key of type JSON for the service user in ZITADEL and put that file there, unchanged.";
    KeyIsApplicationKey: Permanent, Key,
        "The key belongs to an application, not to a service user.",
        "Make a key for the service user (type serviceaccount) and put that file there.";
    KeyPEMInvalid: Permanent, Key,
        "The field key of the key file is not an RSA private key in PEM (PKCS#1 or PKCS#8).",
        "Use the file as ZITADEL wrote it; line breaks in the field key are written as \\n.";
    KeyTooShort: Permanent, Key,
        "The RSA key is shorter than 2048 bits, and nothing is signed with it.",
        "Raise MachineKeySize in ZITADEL to 2048 or more, make a new key and put that file there.";
    KeyExpired: Permanent, Key,
        "The key's own expiration date has passed.",
        "Make a new key in ZITADEL and replace the Secret's content.";
    KeyRejected: Eventual, Key,
        "The server refused the assertion signed with this key, or failed on it: up to v4.13 ZITADEL gives the same answer when an Action throws.",
        "Check that the key still exists in ZITADEL for this user and belongs to this instance, and make a new one if not. If the key is good, look at ZITADEL's log and its Actions.";
    UserInactive: Eventual, Key,
        "The service user is deactivated or locked in ZITADEL.",
        "Reactivate it in ZITADEL.";
    RequestRefused: Permanent, Object,
        "The server refused the request for another reason than the key or the user.",
        "Look at the server's log; an action or target on the server may forbid the token.";
    InstanceUnreachable: Transient, Instance,
        "The server could not be reached, or did not answer in time.",
        "Check the server, the network and spec.connection of the ZitadelInstance.";
    CABundleUnusable: Transient, Instance,
        "The certificates that spec.connection names cannot be used: the object or its entry is missing in the operator's namespace, or it is not PEM.",
        "Correct caBundle, caConfigMapRef or caSecretRef of the ZitadelInstance; a reference needs the operator to know its namespace.";
    TLSFailure: Transient, Instance,
        "No trusted TLS connection to the server could be made.",
        "Check the server's certificate and who signed it.";
    ClockSkew: Transient, Instance,
        "The clocks of the server and of the operator are more than five minutes apart, by the Date of the server's answers; nothing is signed.",
        "Set the clock of the machine that is wrong, or mend what changes the header Date on the way.";
    RateLimited: Transient, Object,
        "The server asked for fewer requests.",
        "Nothing is to be done at once; look at the quota if it lasts.";
    ServerError: Transient, Instance,
        "The server answered with an error of its own.",
        "Look at the server's log if it lasts.";
    IssuerMismatch: Permanent, Instance,
        "The server's discovery document names another issuer, or a token endpoint elsewhere.",
        "Correct spec.issuer or spec.connection.endpoint of the ZitadelInstance.";
    ProjectIDMismatch: Permanent, Instance,
        "The real id of the ZITADEL project differs from the one pinned in the ZitadelInstance.",
        "Correct spec.zitadelProjectID, or check which server answers.";
    InsecureHTTP: Permanent, Object,
        "Plain http is used without spec.connection.allowInsecureHTTP, or to a host that is neither loopback nor *.svc.",
        "Use https, or allow http for a server beside the operator.";
    MalformedAnswer: Transient, Instance,
        "The server's answer is not one that the protocol allows.",
        "Check what stands between the operator and the server.";
    TokenMismatch: Permanent, Object,
        "The token that was minted is not the one that was asked for: issuer, user, audience or organization differ. It was dropped.",
        "Check spec.tokens[].organizationID, and what stands between the operator and the server.";
    LifetimeTooShort: Permanent, Object,
        "The server gives tokens of less than five seconds.",
        "Raise the access token lifetime in ZITADEL.";
    SecretConflict: Permanent, Object,
        "A Secret of this name exists that the object does not control, or that is immutable or not Opaque. It was not touched.",
        "Choose another spec.tokens[].secret.name, or annotate the Secret with zitadel-tokens.dev/adopt.";
    SecretTooLarge: Permanent, Object,
        "With its templates filled in, the Secret would be larger than 128 KiB.",
        "Shorten spec.tokens[].secret.template, or name {{ token }} fewer times; a token is counted with 8 KiB.";
    SecretBeingReplaced: Transient, Object,
        "The Secret still belongs to an earlier object of this name and waits for garbage collection.",
        "Nothing is to be done.";
    SecretContested: Permanent, Object,
        "Somebody keeps deleting or changing the Secret, or asking for renewals: the token was minted several times within ten minutes.",
        "Find out who does it (the audit log tells); the operator tries again slowly.";
    SecretWriteFailed: Transient, Object,
        "The Kubernetes API server refused the write of the Secret. No token is requested while it does; one that was requested before is kept.",
        "Check quotas, admission policies and the operator's permissions in the namespace.";
    SecretChanged: Soon, Object,
        "The Secret changed between the operator's read and its write.",
        "No action needed; the operator reads it again within seconds.";
    NotLeading: Transient, Object,
        "Another replica took over.",
        "Nothing is to be done.";
    ApiServerUnavailable: Soon, Object,
        "The Kubernetes API server was not reached, or the object changed meanwhile.",
        "Nothing is to be done; the operator tries again within seconds.";
    Internal: Transient, Object,
        "The operator failed in a way that it should not, or may not write the status.",
        "Check the operator's permissions; else report it, with the operator's log.";
}

impl Reason {
    /// Whether it stays until somebody changes something.
    #[must_use]
    pub fn is_permanent(self) -> bool {
        matches!(self.retry(), Retry::Permanent | Retry::Eventual)
    }

    /// Meaning and mend together, as conditions and Events show them.
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

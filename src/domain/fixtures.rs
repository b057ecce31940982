//! Facts for tests, made by product code: `secret_draft::draft` renders the Secrets from the requests of the plan, and
//! `key::parse` reads the key.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretSlice};
use serde_json::{Value, json};

use crate::api::access_policy::ZitadelAccessPolicySpec;
use crate::api::service_user::Token;
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::domain::access::Allowed;
use crate::domain::allow_list::AllowList;
use crate::domain::answer::Minted;
use crate::domain::clock_skew::{Sample, Skew};
use crate::domain::facts::{Facts, UnwrittenToken};
use crate::domain::key::{self, ServiceKey};
use crate::domain::key_rotation::KeyState;
use crate::domain::observed_secret::{Controller, OWNER_KIND, ObservedSecret};
use crate::domain::plan::{self, MintRequest, Step, plan};
use crate::domain::secret_draft::{self, SecretDraft};

/// Every token is issued at `at(0)` and lives this many seconds.
pub const LIFETIME: i64 = 3_600;
/// At `at(FRESH)` no token is due, whatever its jitter.
pub const FRESH: i64 = 2_000;
/// At `at(DUE)` every token is due, whatever its jitter.
pub const DUE: i64 = 2_400;
/// Far beyond every skew that the operator uses.
pub const TEN_YEARS: i64 = 10 * 365 * 24 * 3_600;
/// Name of the object.
pub const NAME: &str = "billing";
/// UID of the object.
pub const UID: &str = "9f0c6c1e-0000-4000-8000-000000000001";

/// A key file for tests. Its key is generated in each run, and no server knows it.
static KEY_FILE: LazyLock<Value> = LazyLock::new(|| {
    let pair = KeyPair::generate(KeySize::Rsa2048).expect("a key");
    let der: Pkcs8V1Der<'_> = pair.as_der().expect("PKCS#8");
    let pem = pem("PRIVATE KEY", der.as_ref());
    json!({"type": "serviceaccount", "keyId": "k1", "key": pem, "userId": "7"})
});

static KEY: LazyLock<ServiceKey> =
    LazyLock::new(|| key::parse(KEY_FILE.to_string().as_bytes()).expect("a machine key"));

/// A key file as ZITADEL writes it, but without `expirationDate`.
pub fn key_file() -> Value {
    KEY_FILE.clone()
}

/// A PEM block with these bytes.
pub fn pem(kind: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(64)
        .filter_map(|l| std::str::from_utf8(l).ok())
        .collect();
    format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"))
}

/// The time `seconds` after the token was issued.
pub fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).expect("in range")
}

/// The skew of a clock that is `ahead` seconds ahead, after two responses.
pub fn clock(ahead: i64) -> Skew {
    let mut skew = Skew::default();
    for second in [0, 10] {
        skew.observe(Sample::new(at(second + ahead), at(second), at(second)).expect("a sample"));
    }
    skew
}

/// An object with these tokens, before any Secret is written. Projects 1 and 2 are allowed.
pub fn facts(tokens: &[&str]) -> Facts {
    let token = |name: &&str| {
        json!({"name": name, "projectIDs": ["1"], "secret": {
            "name": format!("{name}-token"), "labels": {"team": "a"}, "annotations": {"note": "b"},
            "template": {"header": "Bearer {{ token }}"}}})
    };
    let user = json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": OWNER_KIND,
        "metadata": {"name": NAME, "namespace": "shop", "uid": UID, "generation": 3},
        "spec": {"instanceRef": {"name": "main"}, "keySecretRef": {"name": "billing-key"},
            "tokens": tokens.iter().map(token).collect::<Vec<_>>()}});
    let instance = json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelInstance", "metadata": {"name": "main"},
        "spec": {"issuer": "https://auth.example.com"}});
    let allowed_metadata = AllowList::with(&["team", "note", "x", "example.com/*"]).expect("well-formed");
    Facts {
        allowed_metadata: Arc::new(allowed_metadata),
        user: Arc::new(serde_json::from_value(user).expect("a service user")),
        in_operator_namespace: false,
        allowed: Ok(allowed(&["1", "2"], false)),
        instance: Ok(Arc::new(serde_json::from_value(instance).expect("an instance"))),
        zitadel_project_id: None,
        clock: clock(0),
        key: Ok(KEY.clone()),
        keys: KeyState {
            bootstrap: Ok(KEY.clone()),
            ledger: Ok(None),
        },
        roles: Ok(None),
        secrets: BTreeMap::new(),
        unwritten: BTreeMap::new(),
        write_failed: BTreeSet::new(),
        leftovers: Vec::new(),
        pending_retries: BTreeMap::new(),
        unscheduled: BTreeMap::new(),
        last_mints: BTreeMap::new(),
    }
}

/// Like [`facts`], after the first reconcile: every token is a JWT in its Secret.
pub fn filled(tokens: &[&str]) -> Facts {
    let mut facts = facts(tokens);
    for index in 0..tokens.len() {
        let value = jwt(&claims(&facts, index, at(LIFETIME)));
        fill(&mut facts, index, &value, at(0), at(LIFETIME));
    }
    facts
}

/// The audiences that an access policy with these values allows.
pub fn allowed(project_ids: &[&str], zitadel_api: bool) -> Allowed {
    let policy = json!({"instanceRef": {"name": "main"}, "namespaceSelector": {},
        "audiences": {"projectIDs": project_ids, "zitadelAPI": zitadel_api}});
    let policy: ZitadelAccessPolicySpec = serde_json::from_value(policy).expect("a policy");
    Allowed::of([&policy], &BTreeMap::new())
}

/// Mutable access to the object.
pub fn user(facts: &mut Facts) -> &mut ZitadelServiceUser {
    Arc::make_mut(&mut facts.user)
}

/// Mutable access to a token of its spec.
pub fn token(facts: &mut Facts, index: usize) -> &mut Token {
    &mut user(facts).spec.tokens[index]
}

/// Mutable access to its instance.
pub fn instance(facts: &mut Facts) -> &mut ZitadelInstance {
    Arc::make_mut(facts.instance.as_mut().expect("an instance"))
}

/// Mutable access to its key.
pub fn service_key(facts: &mut Facts) -> &mut ServiceKey {
    facts.key.as_mut().expect("a key")
}

/// Mutable access to the Secret of a token.
pub fn observed(facts: &mut Facts, index: usize) -> &mut ObservedSecret {
    let name = facts.user.spec.tokens[index].secret.name.clone();
    facts.secrets.get_mut(&name).expect("a Secret")
}

/// Changes the data of a Secret.
pub fn edit(secret: &mut ObservedSecret, change: impl FnOnce(&mut BTreeMap<String, Vec<u8>>)) {
    let decoded = secret.data.iter().map(|(k, v)| (k.clone(), v.expose_secret().to_vec()));
    let mut data = decoded.collect();
    change(&mut data);
    secret.data = Arc::new(data.into_iter().map(|(k, v)| (k, SecretSlice::from(v))).collect());
}

/// Sets or removes the renew request annotation.
pub fn set_renew_request(facts: &mut Facts, value: Option<&str>) {
    user(facts).metadata.annotations = value.map(|value| {
        BTreeMap::from([(
            crate::api::metadata::ANNOTATION_RENEW_REQUEST.to_owned(),
            value.to_owned(),
        )])
    });
}

/// The claims that ZITADEL puts into a token of this spec.
pub fn claims(facts: &Facts, index: usize, expires: Timestamp) -> Value {
    let id = facts.zitadel_project_id.as_deref().unwrap_or_default();
    let expected = plan::expect(facts, &facts.user.spec.tokens[index], id).expect("allowed");
    json!({"iss": expected.issuer, "sub": expected.user_id, "aud": expected.audience, "exp": expires.as_second()})
}

/// A JWT with these claims and a dummy signature.
pub fn jwt(claims: &Value) -> String {
    let part = |json: &Value| URL_SAFE_NO_PAD.encode(json.to_string());
    format!("{}.{}.c2ln", part(&json!({"alg": "RS256"})), part(claims))
}

/// The request that the plan makes if there is no Secret and no unwritten token.
pub fn request(facts: &mut Facts, index: usize) -> MintRequest {
    let Token { name, secret, .. } = facts.user.spec.tokens[index].clone();
    facts.secrets.remove(&secret.name);
    facts.unwritten.remove(&name);
    match plan(facts, at(0)).steps.swap_remove(index) {
        Step::Mint(request) => *request,
        other => panic!("expected Step::Mint: {other:?}"),
    }
}

/// Puts a token into its Secret as after a successful request and write.
pub fn fill(facts: &mut Facts, index: usize, value: &str, issued: Timestamp, expires: Timestamp) {
    let request = request(facts, index);
    let minted = Minted {
        token: value.into(),
        issued,
        expires,
    };
    let record = secret_draft::record(facts, &request.request_hash, &request.template_hash, &minted);
    let draft = secret_draft::draft(facts, &facts.user.spec.tokens[index], &minted.token, &record);
    apply(facts, &draft);
}

/// Adds an unwritten token, as after a successful request and a failed write. The Secret is unchanged.
pub fn keep_unwritten(facts: &mut Facts, index: usize, value: &str, issued: Timestamp) {
    let Token { name, secret, .. } = facts.user.spec.tokens[index].clone();
    let there = facts.secrets.remove(&secret.name);
    let request = request(facts, index);
    let minted = Minted {
        token: value.into(),
        issued,
        expires: issued + SignedDuration::from_secs(LIFETIME),
    };
    let record = secret_draft::record(facts, &request.request_hash, &request.template_hash, &minted);
    facts
        .unwritten
        .insert(name, Arc::new(UnwrittenToken { minted, record }));
    facts.secrets.extend(there.map(|there| (secret.name, there)));
}

/// Applies a draft to the observed Secrets, like server-side apply.
pub fn apply(facts: &mut Facts, draft: &SecretDraft) {
    let secret = facts
        .secrets
        .entry(draft.name.clone())
        .or_insert_with(|| ObservedSecret {
            uid: format!("uid-of-{}", draft.name),
            resource_version: "0".into(),
            controller: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            data: Arc::default(),
            opaque: true,
            immutable: false,
        });
    secret.resource_version.push('1');
    secret.controller = Some(Controller {
        kind: OWNER_KIND.into(),
        name: draft.owner.0.clone(),
        uid: draft.owner.1.clone(),
    });
    secret.labels.extend(draft.labels.clone());
    let annotations = draft.annotations.iter().map(|(k, v)| (k.clone(), v.as_str().into()));
    secret.annotations.extend(annotations);
    let written = draft.data.iter().map(|(k, v)| (k.clone(), v.expose_secret().into()));
    edit(secret, |data| data.extend(written));
}

//! Secrecy. The tests search everything that the operator emits for keys, assertions and tokens, after many kinds of
//! failures. Other processes cannot read them from its memory.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::general_purpose::{GeneralPurpose, NO_PAD, STANDARD as PADDED};
use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelInstance;

use crate::support::child::Running;
use crate::support::issuer::User;
use crate::support::managed::{CLUSTER, Managed};
use crate::support::operator::{Operator, binary};
use crate::support::proxy::Proxy;
use crate::support::world::{World, data, one_token};
use crate::support::{SOON, eventually};

/// This many bytes of a secret, in any encoding, are a leak. Unrelated text does not contain them by chance.
const WINDOW: usize = 24;

/// Finds pieces of secrets: raw, in base64 at each of the three alignments, percent-encoded, in hexadecimal, and as the
/// decimal numbers of Rust's `Debug` output for bytes.
#[derive(Default)]
struct Canary {
    pieces: HashSet<[u8; WINDOW]>,
}

impl Canary {
    /// Adds the private key in a machine key file. The rest of the file is not secret.
    fn key(&mut self, file: &str) {
        let file: Value = serde_json::from_str(file).expect("JSON");
        let pem = file["key"].as_str().expect("a PEM");
        let lines: Vec<&str> = pem.lines().filter(|l| !l.starts_with('-')).collect();
        for line in &lines {
            self.secret(line.as_bytes());
        }
        self.secret(&PADDED.decode(lines.concat()).expect("base64"));
    }

    fn secret(&mut self, secret: &[u8]) {
        let list = |texts: Vec<String>, between: &str| texts.join(between).into_bytes();
        let each = |form: fn(&u8) -> String| secret.iter().map(form).collect::<Vec<_>>();
        let mut forms = vec![
            secret.to_vec(),
            list(each(ToString::to_string), ", "),
            list(each(|b| format!("{b:02x}")), ""),
        ];
        let percent: fn(&u8) -> String = |b| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(*b).to_string(),
            _ => format!("%{b:02X}"),
        };
        forms.push(list(each(percent), ""));
        for alphabet in [STANDARD, URL_SAFE] {
            let engine = GeneralPurpose::new(&alphabet, NO_PAD);
            for before in 0..3 {
                let encoded = engine.encode([&b"\0\0"[..before], secret].concat());
                // The characters at both ends also depend on the bytes next to the secret.
                let whole = (before * 8).div_ceil(6)..(before + secret.len()) * 8 / 6;
                forms.push(encoded.as_bytes()[whole].to_vec());
            }
        }
        for form in forms {
            self.pieces.extend(
                form.windows(WINDOW)
                    .map(|w| <[u8; WINDOW]>::try_from(w).expect("its length")),
            );
        }
    }

    /// The first piece of a secret in `text`, with the text before it.
    fn find(&self, text: &str) -> Option<String> {
        let at = text.as_bytes().windows(WINDOW).position(|w| self.pieces.contains(w))?;
        Some(String::from_utf8_lossy(&text.as_bytes()[at.saturating_sub(200)..at + WINDOW]).into_owned())
    }
}

/// All secrets so far: the keys of `users`, and the assertions and tokens that the issuer received and issued.
async fn canary(world: &World, users: &[User]) -> Canary {
    let mut canary = Canary::default();
    for user in users {
        canary.key(&user.key);
    }
    let mut seen = (0, 0);
    for request in world.issuer.requests().await {
        if let Some(assertion) = request.form["assertion"][0].as_str() {
            seen.0 += 1;
            canary.secret(assertion.as_bytes());
        }
        if !request.access_token.is_empty() {
            seen.1 += 1;
            canary.secret(request.access_token.as_bytes());
        }
    }
    assert!(seen.0 > 15 && seen.1 > 5, "assertions and tokens: {seen:?}");
    canary
}

/// Key Secrets and service users, applied by `kubectl apply`, which keeps a copy of each in an annotation.
struct Applied<'a> {
    world: &'a World,
    items: Vec<Value>,
    users: Vec<User>,
}

impl Applied<'_> {
    /// A user with a service user of this name. `file` turns the key file into the content of the key Secret.
    async fn add(&mut self, name: &str, fields: Value, file: fn(&str) -> String) -> User {
        let user = self.world.issuer.user(fields).await;
        self.items.push(json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": format!("{name}-key")},
            "stringData": {"key.json": file(&user.key)}}));
        self.service_user(name, &one_token(&format!("{name}-token"))["tokens"]);
        self.users.push(user.clone());
        user
    }

    fn service_user(&mut self, name: &str, tokens: &Value) {
        self.items.push(json!({
            "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser", "metadata": {"name": name},
            "spec": {"instanceRef": {"name": self.world.instance}, "keySecretRef": {"name": format!("{name}-key")},
                "tokens": tokens}}));
    }

    fn apply(&mut self) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": std::mem::take(&mut self.items)});
        let arguments = ["-n", &self.world.name, "apply", "-f", "-"];
        let (succeeded, output) = self.world.cluster.kubectl(&arguments, &list.to_string());
        assert!(succeeded, "{output}");
    }
}

/// A policy that refuses the Secret `refused-token` and quotes its token.
async fn quoting_policy(world: &World) {
    let name = &world.name;
    let policy = json!({"metadata": {"name": name}, "spec": {
        "failurePolicy": "Fail",
        "matchConstraints": {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}},
            "resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["secrets"],
                "operations": ["CREATE", "UPDATE"]}]},
        "matchConditions": [{"name": "it", "expression": "object.metadata.name == 'refused-token'"}],
        "validations": [{"expression": "false", "messageExpression": "'no: ' + object.data['token']"}]}});
    let binding = json!({"metadata": {"name": name}, "spec": {"policyName": name, "validationActions": ["Deny"]}});
    let params = PostParams::default();
    let policies: Api<ValidatingAdmissionPolicy> = Api::all(world.client.clone());
    let policy = serde_json::from_value(policy).expect("a policy");
    policies.create(&params, &policy).await.expect("created");
    let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(world.client.clone());
    let binding = serde_json::from_value(binding).expect("a binding");
    bindings.create(&params, &binding).await.expect("created");
    let secret = json!({"metadata": {"name": "refused-token"}, "stringData": {"token": "quoted"}});
    let secret: Secret = serde_json::from_value(secret).expect("a Secret");
    let dry = PostParams {
        dry_run: true,
        ..params
    };
    eventually("the policy quotes the token", async || {
        let refused = world.secrets().create(&dry, &secret).await;
        matches!(refused, Err(kube::Error::Api(status)) if status.message.contains(&PADDED.encode("quoted")))
    })
    .await;
}

fn jwt() -> Value {
    json!({"tokenType": "JWT"})
}

/// A key file without changes.
fn whole(file: &str) -> String {
    file.to_owned()
}

/// The service users that exist before the operator starts, with the status and reason that each gets.
const AT_FIRST: [(&str, &str, &str); 13] = [
    ("good", "True", "Issued"),
    ("opaque", "True", "Issued"),
    ("mismatch", "True", "Issued"),
    ("refused", "False", "SecretWriteFailed"),
    ("foreign", "False", "SecretConflict"),
    ("removed", "False", "KeyRejected"),
    // Unusable Secrets that hold a private key.
    ("garbage", "False", "KeyNotJSON"),
    ("cut-off", "False", "KeyNotJSON"),
    ("bare-pem", "False", "KeyNotJSON"),
    ("application", "False", "KeyIsApplicationKey"),
    ("as-user", "False", "KeyFieldInvalid"),
    ("as-date", "False", "KeyFieldInvalid"),
    ("as-list", "False", "KeyFieldInvalid"),
];

async fn at_first(applied: &mut Applied<'_>, proxy: &Proxy) {
    let world = applied.world;
    // Two objects that do not decode: a service user whose decoding error would quote a key, and a key Secret that kube
    // would log as a whole.
    let odd = applied.add("odd", jwt(), whole).await;
    let pem: Value = serde_json::from_str(&odd.key).expect("JSON");
    applied.add("undecodable", jwt(), whole).await;
    let reference = "\"keySecretRef\":{\"name\":\"undecodable-key\"}";
    let quoted = format!("{reference},\"suspend\":{}", pem["key"]);
    proxy.spoil("zitadelserviceusers/undecodable", reference, &quoted);
    proxy.spoil("secrets/odd-key", "\"type\":\"Opaque\"", "\"type\":[\"Opaque\"]");

    world.secret("foreign-token", json!({"password": "theirs"})).await;
    for (name, ..) in AT_FIRST {
        let fields = if name == "opaque" {
            json!({"tokenType": "BEARER"})
        } else {
            jwt()
        };
        let file: fn(&str) -> String = match name {
            "garbage" => |file| format!("garbage {file}"),
            "cut-off" => |file| file[..file.len() - 20].to_owned(),
            "bare-pem" => |file| edited(file, |f| *f = f["key"].take()),
            "application" => |file| edited(file, |f| f["type"] = json!("application")),
            "as-user" => |file| edited(file, |f| f["userId"] = f["key"].clone()),
            "as-date" => |file| edited(file, |f| f["expirationDate"] = f["key"].clone()),
            "as-list" => |file| edited(file, |f| f["key"] = json!([f["key"]])),
            _ => whole,
        };
        let user = applied.add(name, fields, file).await;
        if name == "removed" {
            world.issuer.remove_key(&user.id, &user.key_id).await;
        }
    }
    let api = json!([{"name": "api", "zitadelAPI": true, "secret": {"name": "opaque-token"}}]);
    applied.service_user("opaque", &api);
    let other = json!([{"name": "main", "projectIDs": ["2"], "secret": {"name": "mismatch-token"}}]);
    applied.service_user("mismatch", &other);
    applied.apply();
    quoting_policy(world).await;
}

/// A server that quotes the assertions that it received and the tokens that it issued.
async fn quoted_by_the_server(applied: &mut Applied<'_>) {
    let world = applied.world;
    let requests = world.issuer.requests().await;
    let assertion = requests
        .iter()
        .find_map(|r| r.form["assertion"][0].as_str())
        .expect("an assertion");
    let token = world.token("good-token").await;
    let answer = json!({"access_token": token, "token_type": "Bearer", "expires_in": 3600});
    let with = |key: &str, value: Value| {
        let mut answer = answer.clone();
        answer[key] = value;
        answer.to_string()
    };
    let error = |error: &str, description: &str| json!({"error": error, "error_description": description}).to_string();
    let cut = answer.to_string().replace(",\"expires_in\"", "");
    let headers = json!({"Retry-After": token, "Location": token, "Www-Authenticate": token, "Set-Cookie": token});
    #[rustfmt::skip]
    let faults = [
        ("quotes-500", 500, token.clone(), "ServerError"),
        ("quotes-503", 503, error("server_error", &token), "ServerError"),
        ("quotes-429", 429, token.clone(), "RateLimited"),
        ("quotes-302", 302, token.clone(), "MalformedResponse"),
        ("quotes-assertion", 400, error("invalid_grant", assertion), "KeyRejected"),
        ("quotes-error", 400, error(assertion, &token), "RequestRejected"),
        ("cut-answer", 200, cut, "MalformedResponse"),
        ("odd-type", 200, with("token_type", json!(token)), "MalformedResponse"),
        ("odd-expiry", 200, with("expires_in", json!(token)), "MalformedResponse"),
        ("odd-token", 200, with("access_token", json!([token])), "MalformedResponse"),
        ("bare-token", 200, json!(token).to_string(), "MalformedResponse"),
        ("others-token", 200, answer.to_string(), "TokenMismatch"),
    ];
    let path = "/oauth/v2/token";
    for (name, status, body, _) in &faults {
        let user = applied.add(name, jwt(), whole).await;
        let fault = json!({"path": path, "userId": user.id, "status": status, "body": body, "headers": headers});
        world.issuer.fault(fault).await;
    }
    let reset = applied.add("reset", jwt(), whole).await;
    let fault = json!({"path": path, "userId": reset.id, "reset": true, "afterHandling": true});
    world.issuer.fault(fault).await;
    // This user requests another audience than before, and the server returns the earlier token.
    let before = with("access_token", json!(world.token("mismatch-token").await));
    let mismatch = world
        .ready("mismatch", "True", "Issued")
        .await
        .status
        .expect("a status");
    let fault = json!({"path": path, "userId": mismatch.user_id, "body": before});
    world.issuer.fault(fault).await;
    applied.service_user("mismatch", &one_token("mismatch-token")["tokens"]);
    applied.apply();
    for (name, _, _, reason) in &faults {
        world.ready(name, "False", reason).await;
    }
    world.ready("reset", "False", "InstanceUnreachable").await;
    world.ready("mismatch", "False", "TokenMismatch").await;

    // A refused key as ZITADEL up to v4.13 reports it.
    world.issuer.settings(json!({"dialect": "errors_internal"})).await;
    let removed = applied.add("removed-too", jwt(), whole).await;
    world.issuer.remove_key(&removed.id, &removed.key_id).await;
    applied.apply();
    world.ready("removed-too", "False", "KeyRejected").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_assertion_or_token_appears_outside_token_secrets() {
    let world = World::new("canary").await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut applied = Applied {
        world: &world,
        items: Vec::new(),
        users: Vec::new(),
    };
    at_first(&mut applied, &proxy).await;
    // The most verbose logging.
    let environment = [("RUST_LOG", OsStr::new("trace"))];
    let flags = ["--log-libraries", "trace"];
    let mut operator = Operator::start_in(&proxy.kubeconfig, &world.selector(), &flags, &environment).await;
    world.instance().await;
    for (name, status, reason) in AT_FIRST {
        world.ready(name, status, reason).await;
    }
    operator.await_line("does not match its schema").await;
    // The operator decodes only the fields of a Secret that it needs.
    world.ready("odd", "True", "Issued").await;
    quoted_by_the_server(&mut applied).await;
    let token = world.token("good-token").await;
    world.renew("good").await;
    world.secret_until("good-token", |d| d["token"] != token).await;
    // The schema refuses a password in a proxy's URL.
    let mut spec = world.instance_spec();
    spec["connection"]["proxy"] = json!("http://me:password@proxy.example.com:3128");
    assert!(world.apply_instance(spec).await.is_err());

    let (status, metrics) = operator.get("/metrics").await;
    assert_eq!(status, 200);
    for user in &applied.users {
        assert!(
            !metrics.contains(&user.id) && !metrics.contains(&user.key_id),
            "{metrics}"
        );
    }
    let mut emitted = emitted(&world).await;
    let (log, stdout) = operator.terminate_whole().await;
    assert!(log.iter().any(|l| l.contains("zitadel_tokens::cli::run: stopped")));
    let log = log.join("\n");
    assert!(log.contains(" TRACE hyper"), "the log has no line of a library");
    emitted.extend([("metrics", metrics), ("stdout", stdout), ("log", log)]);
    let canary = canary(&world, &applied.users).await;
    for (place, text) in emitted {
        assert_eq!(canary.find(&text), None, "the {place} contains a secret");
    }

    // The search does find secrets.
    assert!(canary.find(&world.token("good-token").await).is_some());
    let key = world.secrets().get("good-key").await.expect("there");
    let copy = &key.metadata.annotations.expect("annotations")["kubectl.kubernetes.io/last-applied-configuration"];
    assert!(canary.find(copy).is_some(), "kubectl keeps a copy of the key");
    // A status write keeps the fields of the object that the operator does not hold in memory.
    let meta = world.users().get("good").await.expect("there").metadata;
    assert!(
        meta.annotations
            .is_some_and(|a| a.contains_key("kubectl.kubernetes.io/last-applied-configuration"))
    );
    let managers: HashSet<_> = meta
        .managed_fields
        .into_iter()
        .flatten()
        .filter_map(|f| f.manager)
        .collect();
    assert!(managers.len() > 1, "{managers:?}");
    clean_up(&world).await;
}

fn text(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("JSON")
}

/// A key file with a change. If the result is a JSON string, its text.
fn edited(file: &str, change: fn(&mut Value)) -> String {
    let mut file = serde_json::from_str(file).expect("JSON");
    change(&mut file);
    file.as_str().map_or_else(|| file.to_string(), str::to_owned)
}

/// What the operator wrote into the cluster, without the entry `token` of token Secrets.
async fn emitted(world: &World) -> Vec<(&'static str, String)> {
    let all = ListParams::default();
    let users = world.users().list(&all).await.expect("listed").items;
    let instance = Api::<ZitadelInstance>::all(world.client.clone());
    let instance = instance.get(&world.instance).await.expect("there");
    let events: Api<Event> = Api::namespaced(world.client.clone(), &world.name);
    let events = events.list(&all).await.expect("listed").items;
    assert!(
        users
            .iter()
            .filter(|u| u.status.as_ref().is_some_and(|s| s.observed_generation >= Some(1)))
            .count()
            > 20
    );
    assert!(events.len() > 20, "{} Events", events.len());
    let mut metadata = String::new();
    let mut data = String::new();
    let mut tokens = 0;
    for secret in world.secrets().list(&all).await.expect("listed").items {
        let mut meta = secret.metadata;
        let ours = meta
            .labels
            .as_ref()
            .is_some_and(|l| l.contains_key("zitadel-tokens.dev/service-user"));
        if let Some(annotations) = &mut meta.annotations {
            // kubectl wrote this annotation.
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
        metadata += &text(&meta);
        if ours {
            tokens += 1;
            let mut entries = secret.data.unwrap_or_default();
            entries.remove("token");
            for entry in entries.into_values() {
                data += &String::from_utf8_lossy(&entry.0);
                data.push('\n');
            }
        }
    }
    assert!(tokens >= 3, "{tokens} token Secrets");
    let users: Vec<_> = users.into_iter().map(|u| u.status).collect();
    vec![
        ("status", text(&users)),
        ("instance's status", text(&instance.status)),
        ("Events", text(&events)),
        ("metadata of Secrets", metadata),
        ("token Secrets, apart from the token", data),
    ]
}

/// The operator holds the keys of the administrator and of the users that it creates in Secrets of its own namespace.
#[tokio::test(flavor = "multi_thread")]
async fn no_key_or_token_of_an_administrator_appears_outside_its_secrets() {
    let world = World::new("admin-canary").await;
    let home = world.home();
    world.namespace(&home).await;
    let environment = [("RUST_LOG", OsStr::new("trace"))];
    let flags = ["--log-libraries", "trace", "--namespace", &home];
    let flags = [&flags[..], &CLUSTER].concat();
    let kubeconfig = &world.cluster.kubeconfig;
    let operator = Operator::start_in(kubeconfig, &world.selector(), &flags, &environment).await;
    let managed = Managed::with_operator(world, operator).await;
    let world = &managed.world;
    managed.promote("IAM_OWNER").await;
    let roles = json!([{"organizationIDs": [managed.organization], "roles": ["ORG_OWNER_VIEWER"]}]);
    managed.allow_roles(roles).await;
    managed.rotates(json!({"interval": "1h", "overlap": "10s"})).await;
    managed.key_rotated("True", "KeyRotationOnSchedule").await;
    let mut spec = one_token("billing-token");
    spec["user"] = json!({"organizationID": managed.organization});
    spec["managerRoles"] = json!([{"organizationID": managed.organization, "roles": ["ORG_OWNER_VIEWER"]}]);
    world.service_user("billing", spec).await.expect("accepted");
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    world.ready("billing", "True", "Issued").await;
    world.annotate("billing", "rotate-request", "1").await;
    managed.rotate_admin("1").await;

    let mut canary = Canary::default();
    canary.key(&managed.admin.key);
    let all = ListParams::default();
    let ledgers: Api<Secret> = Api::namespaced(world.client.clone(), &home);
    let mut private = 0;
    for ledger in ledgers.list(&all).await.expect("listed").items {
        for (entry, value) in ledger.data.unwrap_or_default() {
            if entry != "ledger.json" && entry != "credential" {
                private += 1;
                canary.secret(&value.0);
            }
        }
    }
    assert!(private >= 2, "{private} private keys");
    // A key file that is cut off, a personal access token, and a private key without its file.
    let cut = &managed.admin.key[..managed.admin.key.len() - 20];
    let token = world.issuer.personal_token(&managed.admin.id).await;
    canary.secret(token.as_bytes());
    let bare = edited(&managed.admin.key, |file| *file = file["key"].take());
    for (credential, status, reason) in [
        (cut, "False", "CredentialInvalid"),
        (&token, "True", "AdminCredentialReady"),
        (&bare, "False", "CredentialInvalid"),
    ] {
        managed.credential(credential).await;
        managed.credential_is(status, reason).await;
    }
    for request in world.issuer.requests().await {
        if let Some(assertion) = request.form["assertion"][0].as_str() {
            canary.secret(assertion.as_bytes());
        }
        if !request.access_token.is_empty() {
            canary.secret(request.access_token.as_bytes());
        }
    }

    let mut emitted = vec![("metrics", managed.operator.get("/metrics").await.1)];
    let instance = managed.instances().get(&world.instance).await.expect("there");
    emitted.push(("instance", text(&instance)));
    let users = world.users().list(&all).await.expect("listed").items;
    emitted.push(("service users", text(&users)));
    let events: Api<Event> = Api::namespaced(world.client.clone(), &world.name);
    let events = events.list(&all).await.expect("listed").items;
    assert!(!events.is_empty());
    emitted.push(("Events", text(&events)));
    let mut secrets = String::new();
    for mut secret in world.secrets().list(&all).await.expect("listed").items {
        secret.data.get_or_insert_default().remove("token");
        secrets += &text(&secret);
    }
    emitted.push(("Secrets of the tenant", secrets));
    let mut kept = String::new();
    for secret in ledgers.list(&all).await.expect("listed").items {
        let ledger = data(&secret).remove("ledger.json");
        kept += &text(&secret.metadata);
        kept += &ledger.unwrap_or_default();
    }
    emitted.push(("ledgers, apart from the private keys", kept));
    let (log, stdout) = managed.operator.terminate_whole().await;
    emitted.extend([("stdout", stdout), ("log", log.join("\n"))]);
    for (place, text) in emitted {
        assert_eq!(canary.find(&text), None, "the {place} contains a secret");
    }
    let billing = world.token("billing-token").await;
    assert!(canary.find(&billing).is_some(), "the search finds secrets");
}

/// Deletes the test's cluster-scoped objects.
async fn clean_up(world: &World) {
    let params = DeleteParams::default();
    let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(world.client.clone());
    bindings.delete(&world.name, &params).await.expect("deleted");
    let policies: Api<ValidatingAdmissionPolicy> = Api::all(world.client.clone());
    policies.delete(&world.name, &params).await.expect("deleted");
}

/// A world-readable folder that exists until it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("zitadel-tokens-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("made");
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o755)).expect("changed");
        Self(folder)
    }

    /// A kubeconfig with this user, and a cluster at the discard port, where nothing listens.
    fn kubeconfig(&self, user: &str, cluster: &str) -> PathBuf {
        let path = self.0.join("kubeconfig");
        let text = format!(
            "{{apiVersion: v1, kind: Config, current-context: p, users: [{{name: p, user: {user}}}],\n
             clusters: [{{name: p, cluster: {{server: \"http://127.0.0.1:9\"{cluster}}}}}],
             contexts: [{{name: p, context: {{cluster: p, user: p}}}}]}}"
        );
        std::fs::write(&path, text).expect("written");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // If this fails, the files stay in the temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn owner(pid: u32) -> u32 {
    std::fs::metadata(format!("/proc/{pid}/environ"))
        .expect("a process")
        .uid()
}

/// Runs a command as a user other than root. Files in `/proc/PID` belong to the process's user, or to root if the
/// process is not dumpable (proc(5)). For processes of root, the two cases look the same.
fn as_nobody(binary: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    if std::fs::metadata("/proc/self").expect("a process").uid() == 0 {
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    }
    command.arg(binary);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_memory_is_neither_dumped_nor_readable_by_other_processes_of_its_user() {
    let folder = Folder::new("memory");
    // Other users cannot read the build folder.
    let copy = folder.0.join("zitadel-tokens");
    std::fs::copy(binary(), &copy).expect("copied");
    let kubeconfig = folder.kubeconfig("{}", "");
    let (operator, _stdout) = Running::start(
        "operator",
        as_nobody(&copy)
            .args(["run", "--listen", "127.0.0.1:0"])
            .env("KUBECONFIG", kubeconfig)
            .env("RUST_LOG", "trace"),
    );
    let (other, _stdout) = Running::start("another", &mut as_nobody(Path::new("cat")));
    eventually("a request fails", async || {
        let log = operator.log();
        log.iter().any(|l| l.contains("could not read the version of the CRD"))
    })
    .await;
    let pid = operator.child.id();
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
    let core: Vec<_> = limits.lines().filter(|l| l.starts_with("Max core file size")).collect();
    let figures: Vec<_> = core[0].split_whitespace().skip(4).take(2).collect();
    assert_eq!(figures, ["0", "0"], "{limits}");
    eventually("the other process runs as nobody", async || {
        owner(other.child.id()) != 0
    })
    .await;
    assert_eq!(owner(pid), 0);

    // RUST_LOG does not enable logs of libraries, although they log the failed connection at DEBUG.
    for line in operator.log() {
        let words: Vec<&str> = line.split_whitespace().take(3).collect();
        let [_, level, target] = words[..] else {
            panic!("{line}")
        };
        assert!(
            target.starts_with("zitadel_tokens::") || ["WARN", "ERROR"].contains(&level),
            "{line}"
        );
    }
}

#[test]
fn errors_do_not_quote_the_kubeconfig() {
    let folder = Folder::new("kubeconfig");
    for (name, user, cluster) in [
        ("a list as token", "{token: [canary]}", ""),
        ("an object as token", "{token: {canary: canary}}", ""),
        ("truncated", "{token: \"canary", ""),
        (
            "a proxy with a password",
            "{token: t}",
            ", proxy-url: \"http://me:canary@127.0.0.1:9\"",
        ),
        (
            "an invalid key",
            "{client-certificate-data: canary, client-key-data: canary}",
            "",
        ),
        (
            "a plugin that fails",
            "{exec: {apiVersion: client.authentication.k8s.io/v1, command: sh, args: [-c, 'echo canary; exit 1']}}",
            "",
        ),
        ("a token of two lines", "{token: \"canary\\ncanary\"}", ""),
    ] {
        let kubeconfig = folder.kubeconfig(user, cluster);
        let output = Command::new("timeout")
            .args(["--signal", "KILL"])
            .arg(SOON.as_secs().to_string())
            .arg(binary())
            .args(["run", "--listen", "127.0.0.1:0"])
            .env("KUBECONFIG", kubeconfig)
            .env("RUST_LOG", "trace")
            .env_remove("KUBERNETES_SERVICE_HOST")
            .output()
            .expect("it runs");
        let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(1), "{name}: {printed}");
        assert!(
            !printed.is_empty() && !printed.contains("canary") && !printed.contains("panicked"),
            "{name}: {printed}"
        );
    }
}

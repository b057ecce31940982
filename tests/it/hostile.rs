//! Invalid and malicious objects. The operator reports or repairs each, serves all other objects, and does not panic.
//! The tests read and write them as plain JSON, because kube's types cannot represent them.

use std::collections::BTreeSet;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kube::Client;
use kube::api::{GetParams, ListParams, Patch, PatchParams, PostParams};
use kube::core::Request;
use serde_json::{Value, json};
use tokio::sync::OnceCell;
use zitadel_tokens::controller::guarded::Guarded;

use crate::support::cluster::{Cluster, install_relaxed_crds};
use crate::support::eventually;
use crate::support::issuer::Issuer;
use crate::support::operator::Operator;
use crate::support::world::{PROJECT, World, claims, condition, everything, one_token};

/// A valid RFC 3339 time, so Kubernetes accepts it, but later than the last time that jiff can represent.
const NO_MOMENT: &str = "9999-12-31T23:59:59Z";

const TOKEN: &str = "/oauth/v2/token";

/// An object's name, and the change that makes it invalid.
type Odd = (&'static str, fn(&mut Value));

/// Checks that no reconcile panicked.
fn assert_no_panic(operator: &Operator) {
    let panics: Vec<_> = operator.log().into_iter().filter(|l| l.contains("panic")).collect();
    assert!(panics.is_empty(), "{panics:?}");
}

/// A collection of API objects, read and written as plain JSON.
struct Raw {
    client: Client,
    path: String,
}

impl Raw {
    fn at(world: &World, path: &str) -> Self {
        Self {
            client: world.client.clone(),
            path: path.to_owned(),
        }
    }

    /// The service users of the world's namespace.
    fn users(world: &World) -> Self {
        let path = format!(
            "/apis/zitadel-tokens.dev/v1alpha1/namespaces/{}/zitadelserviceusers",
            world.name
        );
        Self::at(world, &path)
    }

    fn secrets(world: &World) -> Self {
        Self::at(world, &format!("/api/v1/namespaces/{}/secrets", world.name))
    }

    fn request(&self) -> Request {
        Request::new(&self.path)
    }

    async fn create(&self, object: &Value) -> Value {
        let request = self.request().create(&PostParams::default(), bytes(object));
        let created = self.client.request(request.expect("a request")).await;
        created.expect("created")
    }

    /// Reads an object without its `managedFields`, which may be nested too deeply to parse.
    async fn get(&self, name: &str) -> Value {
        let request = self.request().get(name, &GetParams::default());
        let got: Guarded<Value> = self.client.request(request.expect("a request")).await.expect("there");
        got.0.expect("JSON")
    }

    async fn list(&self) -> Value {
        let request = self.request().list(&ListParams::default());
        self.client.request(request.expect("a request")).await.expect("listed")
    }

    async fn patch(&self, name: &str, change: &Value) {
        let request = self
            .request()
            .patch(name, &PatchParams::default(), &Patch::Merge(change));
        let patched = self.client.request_text(request.expect("a request")).await;
        patched.expect("patched");
    }

    async fn patch_status(&self, name: &str, status: &Value) {
        let change = json!({"status": status});
        let params = PatchParams::default();
        let request = self
            .request()
            .patch_subresource("status", name, &params, &Patch::Merge(change));
        let patched = self.client.request_text(request.expect("a request")).await;
        patched.expect("patched");
    }

    /// Sets `managedFields` with this time, as a restore from a backup does: every client that writes an object may set
    /// them. They are nested more deeply than the operator's JSON parser allows.
    async fn set_managed_fields(&self, name: &str, time: &str, depth: usize) {
        // The label is set first, because the API server records a changed field with the real time.
        self.patch(name, &json!({"metadata": {"labels": {"a": "b"}}})).await;
        let mut object = self.get(name).await;
        object["metadata"]["managedFields"] = json!([{
            "manager": "restore", "operation": "Update", "apiVersion": object["apiVersion"], "time": time,
            "fieldsType": "FieldsV1", "fieldsV1": {"f:metadata": {"f:labels": {"f:a": "deep"}}},
        }]);
        let deep = format!("{}{{}}{}", r#"{"f:a":"#.repeat(depth), "}".repeat(depth));
        let object = object.to_string().replace(r#""deep""#, &deep);
        let request = self
            .request()
            .replace(name, &PostParams::default(), object.into_bytes());
        let stored = self.client.request_text(request.expect("a request")).await;
        let stored = stored.expect("replaced");
        assert!(stored.contains(time) && stored.contains(&deep), "{stored}");
    }

    /// Waits until an object's condition Ready has this status and reason.
    async fn ready(&self, name: &str, status: &str, reason: &str) {
        let what = format!("{name} Ready={status} {reason}");
        eventually(&what, async || {
            let object = self.get(name).await;
            let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
            object["status"]["observedGeneration"] == object["metadata"]["generation"]
                && conditions
                    .iter()
                    .any(|c| c["type"] == "Ready" && c["status"] == status && c["reason"] == reason)
        })
        .await;
    }
}

fn bytes(object: &Value) -> Vec<u8> {
    serde_json::to_vec(object).expect("JSON")
}

/// A service user whose Secret is `NAME-token`, with one change.
fn service_user(world: &World, name: &str, change: impl FnOnce(&mut Value)) -> Value {
    let mut spec = one_token(&format!("{name}-token"));
    spec["instanceRef"] = json!({"name": world.instance});
    spec["keySecretRef"] = json!({"name": "shared-key"});
    change(&mut spec);
    json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser",
        "metadata": {"name": name, "labels": {"a": "b"}}, "spec": spec,
    })
}

/// A name of this length with this beginning.
fn long(beginning: &str, length: usize) -> String {
    format!("{beginning:n<length$}")
}

/// A cluster whose CRDs accept every spec and status. It runs until the process ends.
async fn relaxed() -> &'static Cluster {
    static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();
    let start = async || {
        let cluster = Cluster::start();
        install_relaxed_crds(&cluster.client().await).await;
        cluster
    };
    CLUSTER.get_or_init(start).await
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_object_does_not_affect_others() {
    let world = World::on(relaxed().await, "unreadable", Issuer::start(&[])).await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("shared-key", &user).await;
    let users = Raw::users(&world);

    // All these objects exist before the operator starts, so they are in its first lists.
    let unreadable: [Odd; 5] = [
        ("no-spec", |spec| *spec = json!({})),
        ("no-list", |spec| spec["tokens"] = json!("main")),
        ("no-token", |spec| spec["tokens"] = json!([7])),
        ("no-policy", |spec| {
            spec["tokens"][0]["secret"]["deletionPolicy"] = json!("Shred");
        }),
        ("no-text", |spec| {
            spec["tokens"][0]["secret"]["template"] = json!({"a": {"b": 1e300}});
        }),
    ];
    for (name, change) in unreadable {
        users.create(&service_user(&world, name, change)).await;
    }
    let instances = Raw::at(&world, "/apis/zitadel-tokens.dev/v1alpha1/zitadelinstances");
    let odd = format!("{}-odd", world.name);
    instances
        .create(&json!({
            "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelInstance",
            "metadata": {"name": odd, "labels": {"test": world.instance}}, "spec": {"issuer": 7},
        }))
        .await;
    instances
        .patch_status(&world.instance, &json!({"conditions": "none"}))
        .await;
    world.namespace(&odd).await;
    let namespaces = Raw::at(&world, "/api/v1/namespaces");
    for name in [&odd, &world.name] {
        namespaces.set_managed_fields(name, NO_MOMENT, 200).await;
    }
    // Only a reader that parses more of these than it needs fails on them.
    for name in ["restored", "status"] {
        users.create(&service_user(&world, name, |_| {})).await;
    }
    users.set_managed_fields("restored", NO_MOMENT, 200).await;
    instances.set_managed_fields(&world.instance, NO_MOMENT, 200).await;
    Raw::secrets(&world)
        .set_managed_fields("shared-key", NO_MOMENT, 200)
        .await;
    users
        .patch_status("status", &json!({"tokens": [[]], "conditions": 7, "expiresAt": "soon"}))
        .await;
    // Templates that the CRD schema refuses and that do not make a valid Secret.
    let invalid: [Odd; 4] = [
        ("data-key", |template| template["a/b"] = json!("x")),
        ("data-path", |template| template[".."] = json!("x")),
        ("data-name", |template| template[&"k".repeat(300)] = json!("x")),
        ("data-size", |template| {
            template["a"] = json!("{{ token }}".repeat(64 * 1024 / 11));
        }),
    ];
    for (name, change) in invalid {
        let object = service_user(&world, name, |spec| {
            spec["tokens"][0]["secret"]["template"] = json!({});
            change(&mut spec["tokens"][0]["secret"]["template"]);
        });
        users.create(&object).await;
    }

    let mut operator = world.operator().await;
    for name in ["restored", "status"] {
        users.ready(name, "True", "Issued").await;
    }
    for (name, _) in invalid {
        users.ready(name, "False", "InvalidSpec").await;
    }
    let not_served = |name: &str| format!("is not served object={}/{name}", world.name);
    for (name, _) in unreadable {
        let line = operator.await_line(&not_served(name)).await;
        assert!(line.contains("WARN"), "{line}");
        // Without an instance, the operator does not know whether it serves the object, so it writes no status.
        if name != "no-spec" {
            users.ready(name, "False", "ObjectUnreadable").await;
        }
    }

    // An object that the operator served becomes unreadable. The operator leaves it alone and serves the others.
    let secret = |policy: &str| json!({"spec": {"tokens": [{"name": "main", "projectIDs": [PROJECT], "secret": {"name": "restored-token", "deletionPolicy": policy}}]}});
    users.patch("restored", &secret("Shred")).await;
    operator.await_line(&not_served("restored")).await;
    users.ready("restored", "False", "ObjectUnreadable").await;
    Raw::secrets(&world)
        .set_managed_fields("status-token", NO_MOMENT, 200)
        .await;
    world.sentinel().await;
    let token = world.token("restored-token").await;
    // After a fix, the operator serves them.
    users.patch("restored", &secret("Retain")).await;
    users.ready("restored", "True", "Issued").await;
    assert_eq!(world.token("restored-token").await, token);
    let fixed = service_user(&world, "no-spec", |_| {});
    users.patch("no-spec", &json!({"spec": fixed["spec"]})).await;
    users.ready("no-spec", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 3);

    assert_no_panic(&operator);
    let write_failed = |line: &&String| line.contains("WARN") && line.contains("could not be written");
    assert_eq!(operator.log().iter().find(write_failed), None);
}

/// Even if the schema accepts an invalid name, the operator puts it into no URL.
#[tokio::test(flavor = "multi_thread")]
async fn invalid_secret_names_are_never_requested() {
    let cluster = relaxed().await;
    let world = World::on(cluster, "names", Issuer::start(&[])).await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("shared-key", &user).await;
    let users = Raw::users(&world);
    let mut names = Vec::new();
    for odd in [
        "../../default/secrets/k",
        "a/b",
        "",
        "a\n",
        "a?b",
        "%2e%2e",
        "..",
        "A",
        &"n".repeat(300),
    ] {
        for field in ["token", "key"] {
            let name = format!("name-{}", names.len());
            let object = service_user(&world, &name, |spec| match field {
                "token" => spec["tokens"][0]["secret"]["name"] = json!(odd),
                _ => spec["keySecretRef"]["name"] = json!(odd),
            });
            users.create(&object).await;
            names.push(name);
        }
    }
    let operator = world.operator().await;
    for name in &names {
        users.ready(name, "False", "InvalidSpec").await;
    }
    let requested = cluster
        .audit
        .requests(&world.name)
        .into_iter()
        .chain(cluster.audit.requests("default"));
    let requested: Vec<_> = requested
        .filter(|r| r.resource == "secrets" && r.verb == "get")
        .map(|r| r.name)
        .collect();
    assert!(
        requested
            .iter()
            .all(|name| name.ends_with("-token") || name == "shared-key"),
        "{requested:?}"
    );
    assert_eq!(world.issuer.mints().await, 0);
    assert_no_panic(&operator);
}

/// An instance that becomes unreadable no longer allows what it allowed before.
#[tokio::test(flavor = "multi_thread")]
async fn unreadable_instance_allows_nothing() {
    let world = World::on(relaxed().await, "unreadable-instance", Issuer::start(&[])).await;
    let operator = world.operator().await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    let users = Raw::users(&world);
    let instances = Raw::at(&world, "/apis/zitadel-tokens.dev/v1alpha1/zitadelinstances");
    let connection = world.instance_spec()["connection"].clone();
    instances
        .patch(&world.instance, &json!({"spec": {"connection": "none"}}))
        .await;
    users.ready("billing", "False", "InstanceInvalid").await;
    instances.ready(&world.instance, "False", "ObjectUnreadable").await;
    world.renew("billing").await;
    users.ready("billing", "False", "InstanceInvalid").await;
    assert_eq!(world.issuer.mints().await, 1);
    instances
        .patch(&world.instance, &json!({"spec": {"connection": connection}}))
        .await;
    instances.ready(&world.instance, "True", "InstanceReady").await;
    users.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 2);
    assert_no_panic(&operator);
}

/// A policy that becomes undecodable no longer allows what it allowed before. Other policies stay in effect.
#[tokio::test(flavor = "multi_thread")]
async fn undecodable_policy_allows_nothing() {
    let world = World::on(relaxed().await, "undecodable-policy", Issuer::start(&[])).await;
    let operator = world.operator().await;
    world.instance().await;
    let other = format!("{}-other", world.instance);
    world
        .policy(&other, world.selector_of_namespace(), json!({"projectIDs": ["2"]}))
        .await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("other-key", &user).await;
    let second = json!({"tokens": [{"name": "main", "projectIDs": ["2"], "secret": {"name": "other-token"}}]});
    world.service_user("other", second).await.expect("accepted");
    world.ready("billing", "True", "Issued").await;
    world.ready("other", "True", "Issued").await;
    let policies = Raw::at(&world, "/apis/zitadel-tokens.dev/v1alpha1/zitadelaccesspolicies");
    for undecodable in [
        json!({"audiences": {"projectIDs": "*", "zitadelAPI": true}}),
        json!({"audiences": {"projectIDs": ["*"]}, "namespaceSelector": "all"}),
        json!({"audiences": {"projectIDs": ["*"]}, "namespaceSelector": null}),
    ] {
        let name = world.policy_name();
        policies.patch(&name, &json!({"spec": undecodable})).await;
        world.ready("billing", "False", "AccessDenied").await;
        world.ready("other", "True", "Issued").await;
        world.allow(world.selector_of_namespace(), everything()).await;
        world.ready("billing", "True", "Issued").await;
    }
    assert_eq!(world.issuer.mints().await, 2);
    assert_no_panic(&operator);
}

/// An operator with this entry in its allow list for labels and annotations.
async fn with_metadata(world: &World, entry: &str) -> Operator {
    let flags = ["--allow-secret-metadata", entry];
    Operator::start_with(&world.cluster.kubeconfig, &world.selector(), &flags).await
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_at_every_limit_are_served() {
    let base = World::new("limits").await;
    let pad = 63 - base.name.len() - 1;
    let world = World::beside(&base, &"n".repeat(pad))
        .await
        .with_instance(&long(&format!("{}-", base.name), 63));
    assert_eq!((world.name.len(), world.instance.len()), (63, 63));
    let prefix = "p".repeat(253);
    let operator = with_metadata(&world, &format!("{prefix}/*")).await;
    world.allow(world.selector_of_namespace(), everything()).await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    let key = long("key", 253);
    world.key_secret(&key, &user).await;

    let projects = |i: usize| (0..32).map(|j| long(&format!("{i}_{j}_"), 64)).collect::<BTreeSet<_>>();
    let secret_name = |i: usize| long(&format!("s{i}"), 253);
    let label = format!("{prefix}/{}", "l".repeat(63));
    let tokens = (0..16).map(|i| {
        json!({
            "name": long(&format!("t{i}"), 63), "projectIDs": projects(i), "projectRoles": true,
            "secret": {"name": secret_name(i), "labels": {&label: "v".repeat(63)}, "annotations": {&label: "v"}},
        })
    });
    let mut tokens: Vec<Value> = tokens.collect();
    // A four-byte character counts as one in the limit of a single text, and as four in the limit of all texts. The
    // result is a Secret of about 120 KiB.
    let wide = |count: usize, key: &str, length: usize| -> Value {
        let entries = (0..count).map(|i| (format!("{key}{i}"), json!("𝄞".repeat(length))));
        Value::Object(entries.collect())
    };
    tokens[0]["secret"]["template"] = wide(1, "e", 16 * 1024 - 1);
    tokens[0]["secret"]["annotations"] = wide(12, &format!("{prefix}/e"), 1024);
    let name = long("u", 63);
    world
        .service_user(&name, json!({"keySecretRef": {"name": key}, "tokens": tokens}))
        .await
        .expect("accepted");

    let users = Raw::users(&world);
    users.ready(&name, "True", "Issued").await;
    let status = &users.get(&name).await["status"];
    assert_eq!(status["tokensReady"], "16/16");
    for i in 0..16 {
        let secret = world.secrets().get(&secret_name(i)).await.expect("there");
        let token = crate::support::world::data(&secret)["token"].clone();
        let audience: BTreeSet<String> = serde_json::from_value(claims(&token)["aud"].clone()).expect("a list");
        assert_eq!(audience, projects(i));
        let labels = secret.metadata.labels.expect("labels");
        assert_eq!(
            (labels[&label].len(), &labels["zitadel-tokens.dev/service-user"]),
            (63, &name)
        );
    }
    assert!(world.events(&name).await.contains("Normal Issued"));
    assert_eq!(world.issuer.mints().await, 16);
    assert_no_panic(&operator);
}

/// The operator substitutes five names literally, and interprets nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn template_text_is_literal_except_for_its_placeholders() {
    let world = World::new("templates").await;
    let operator = world.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    // T stands for the token.
    let table = [
        ("{{ token }}", "T"),
        ("{{token}}", "T"),
        ("{{\t token\r\n}}", "T"),
        ("{{\u{a0}token}}", "T"),
        ("{{ token }}{{ token }}", "TT"),
        ("{{ {{ token }} }}", "{{ T }}"),
        ("{{{ token }}}", "{{{ token }}}"),
        ("{{{{ token }}}}", "{{T}}"),
        ("{{ token", "{{ token"),
        ("{{ token }", "{{ token }"),
        ("token }}", "token }}"),
        ("{{ }} {{}} {{", "{{ }} {{}} {{"),
        ("}}{{", "}}{{"),
        ("{{ Token }} {{ tok en }}", "{{ Token }} {{ tok en }}"),
        ("{{ unknown }} {{ token }}", "{{ unknown }} T"),
        ("{{ token | base64 }}", "{{ token | base64 }}"),
        ("{{- token -}}", "{{- token -}}"),
        ("{% token %} ${token} $(token)", "{% token %} ${token} $(token)"),
        ("{{ .Values.token }}", "{{ .Values.token }}"),
        ("{{ key }} {{ assertion }}", "{{ key }} {{ assertion }}"),
        ("\0{{ token }}\0", "\0T\0"),
        ("\u{feff}ü𝄞{{ token }}\u{202e}", "\u{feff}ü𝄞T\u{202e}"),
        ("{{ tokeń }}", "{{ tokeń }}"),
        ("a: {{ token }}\nb: 1\n", "a: T\nb: 1\n"),
        ("", ""),
        ("{{ token_type }}", "Bearer"),
        ("{{ audience }}", PROJECT),
    ];
    let template = table
        .iter()
        .enumerate()
        .map(|(i, (text, _))| (format!("k{i}"), json!(text)));
    let mut spec = one_token("billing-token");
    spec["tokens"][0]["secret"]["template"] = Value::Object(template.collect());
    world.service_user("billing", spec).await.expect("accepted");
    let data = world.secret_until("billing-token", |d| d.contains_key("token")).await;
    for (i, (text, expected)) in table.iter().enumerate() {
        let expected = expected.replace('T', "\u{1}").replace("\u{1}oken", "Token");
        assert_eq!(
            data[&format!("k{i}")],
            expected.replace('\u{1}', &data["token"]),
            "{text}"
        );
    }
    // The operator adds no line breaks.
    for key in ["token", "token_type", "issuer", "expires_at"] {
        assert!(data[key].bytes().all(|b| b.is_ascii_graphic()), "{key}");
    }
    world.ready("billing", "True", "Issued").await;
    assert_no_panic(&operator);
}

#[tokio::test(flavor = "multi_thread")]
async fn edited_status_and_record_are_overwritten() {
    let world = World::new("edits").await;
    let operator = world.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;

    let year = |year: &str| json!({"expiresAt": format!("{year}-12-30T00:00:00Z"), "issuedAt": format!("{year}-01-02T02:00:00Z")});
    let records = [
        json!("garbage"),
        json!(""),
        json!("{}"),
        json!("[".repeat(100_000)),
        json!("x".repeat(200 * 1024)),
        year("9999"),
        year("-009999"),
        year("0000"),
        json!({"v": u64::MAX}),
        json!({"content": "\0"}),
        json!({"owner": "", "expiresAt": "9999-12-31T23:59:59Z"}),
    ];
    let secret = |i: usize| format!("billing-{i}");
    let tokens = (0..records.len())
        .map(|i| json!({"name": format!("t{i}"), "projectIDs": [PROJECT], "secret": {"name": secret(i)}}));
    let spec = json!({"tokens": tokens.collect::<Vec<_>>()});
    world.service_user("billing", spec).await.expect("accepted");
    let good = world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, records.len());

    // Each edited record costs one token request.
    let record = "zitadel-tokens.dev/record";
    for (i, change) in records.iter().enumerate() {
        let before = world.secrets().get(&secret(i)).await.expect("there");
        let old = crate::support::world::data(&before)["token"].clone();
        let text = match change {
            Value::String(text) => text.clone(),
            fields => {
                let text = &before.metadata.annotations.as_ref().expect("annotations")[record];
                let mut whole: Value = serde_json::from_str(text).expect("a record");
                for (name, value) in fields.as_object().expect("fields") {
                    assert!(!whole[name].is_null(), "the record has {name}");
                    whole[name] = value.clone();
                }
                whole.to_string()
            }
        };
        world
            .edit_secret(&secret(i), json!({"metadata": {"annotations": {record: text}}}))
            .await;
        world.secret_until(&secret(i), |d| d["token"] != old).await;
    }
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 2 * records.len());

    let users = Raw::users(&world);
    // The operator writes the status of the last token after its Secret.
    let last = secret(records.len() - 1);
    let last = world.secret_until(&last, |_| true).await["expires_at"].clone();
    eventually("the status shows the last token", async || {
        let status = &users.get("billing").await["status"];
        status["tokens"][records.len() - 1]["expiresAt"] == last
    })
    .await;
    let reference = users.get("billing").await["status"]["tokens"].clone();
    let statuses = [
        json!({"expiresAt": NO_MOMENT, "keyExpiresAt": NO_MOMENT}),
        json!({"tokens": [{"name": "t0", "secretName": "x", "failingSince": NO_MOMENT}]}),
        json!({"tokens": [{"name": "t0", "secretName": "", "issuedAt": "9999-12-30T21:00:00Z", "renewAt": "0000-01-01T00:00:00Z",
            "expiresAt": "9999-12-30T22:00:00Z", "failingSince": "9999-12-30T22:00:00Z", "lifetimeSeconds": i64::MIN, "reason": "Odd"}]}),
        json!({"tokens": [{"name": "\0", "secretName": "\u{202e}", "renewAt": "9999-12-30T22:00:00Z", "expiresAt": "0000-01-01T00:00:00Z"}]}),
        json!({"conditions": [{"type": "Ready", "status": "True", "reason": "Issued", "message": "", "lastTransitionTime": NO_MOMENT}]}),
        json!({"conditions": [{"type": "Stalled", "status": "True", "reason": "Odd", "message": "x".repeat(32_768), "lastTransitionTime": "0000-01-01T00:00:00+14:00"}]}),
        json!({"observedGeneration": i64::MAX, "tokensReady": "x".repeat(100_000), "userID": "", "tokens": null}),
    ];
    let repaired = async |what: &Value| {
        eventually(&format!("repaired: {what:.200}"), async || {
            let status = &users.get("billing").await["status"];
            let text = status.to_string();
            let odd = ["9999-", "0000-", "Odd", "xxx", "Stalled"]
                .iter()
                .any(|odd| text.contains(odd));
            !odd && status["tokens"] == reference
                && status["observedGeneration"] == 1
                && status["tokensReady"] == "11/11"
        })
        .await;
    };
    for status in &statuses {
        users.patch_status("billing", status).await;
        repaired(status).await;
    }
    let object = world.ready("billing", "True", "Issued").await;
    let user_id =
        |object: &zitadel_tokens::api::ZitadelServiceUser| object.status.as_ref().and_then(|s| s.user_id.clone());
    assert_eq!(user_id(&object), user_id(&good));

    // The same edits while no operator runs.
    assert_no_panic(&operator);
    operator.kill();
    users.patch_status("billing", &statuses[2]).await;
    users.patch_status("billing", &statuses[4]).await;
    let operator = world.operator().await;
    repaired(&statuses[4]).await;
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 2 * records.len());
    assert_no_panic(&operator);
}

/// An object has room for 256 KiB of annotations, and so has its Secret. What the operator copies to the Secret must
/// fit beside all other annotations.
#[tokio::test(flavor = "multi_thread")]
async fn renew_request_of_any_length_is_handled_once() {
    let world = World::new("request").await;
    let operator = with_metadata(&world, "example.com/*").await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let notes = (0..15).map(|i| (format!("example.com/n{i}"), json!("𝄞".repeat(1024))));
    let mut spec = one_token("billing-token");
    spec["tokens"][0]["secret"]["annotations"] = Value::Object(notes.collect());
    world.service_user("billing", spec).await.expect("accepted");
    let mut token = world.token("billing-token").await;
    let users = Raw::users(&world);
    for request in ["", "\0\"\\\n", &"\0".repeat(200 * 1024)] {
        let change = json!({"metadata": {"annotations": {"zitadel-tokens.dev/renew-request": request}}});
        users.patch("billing", &change).await;
        let renewed = world.secret_until("billing-token", |d| d["token"] != token).await;
        token.clone_from(&renewed["token"]);
        world.ready("billing", "True", "Issued").await;
    }
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 4);
    assert_no_panic(&operator);
}

/// The operator quotes no part of an answer. Otherwise a malicious server or proxy could write text that other people
/// read.
#[tokio::test(flavor = "multi_thread")]
async fn no_output_quotes_a_server_answer() {
    let world = World::new("words").await;
    let flags = ["--log-level", "trace"];
    let operator = Operator::start_with(&world.cluster.kubeconfig, &world.selector(), &flags).await;
    world.instance().await;
    // With the first token, the operator learns the id of the ZITADEL project.
    world.simple("first", json!({"tokenType": "JWT"})).await;
    world.token("first-token").await;
    let jwt = |claims: Value| {
        let payload = URL_SAFE_NO_PAD.encode(claims.to_string());
        let token = format!("{}.{payload}.canary", URL_SAFE_NO_PAD.encode(r#"{"alg":"RS256"}"#));
        json!({"access_token": token, "token_type": "Bearer", "expires_in": 3600}).to_string()
    };
    let refusal = json!({"error": "invalid_grant", "error_description": "canary\r\n\u{1b}[31mcanary"}).to_string();
    let answers = [
        ("refused", 400, refusal, "KeyRejected"),
        (
            "other-refusal",
            400,
            json!({"error": "canary", "error_uri": "canary"}).to_string(),
            "RequestRejected",
        ),
        ("html", 200, "<html>canary</html>".to_owned(), "MalformedResponse"),
        (
            "no-token",
            200,
            json!({"access_token": "canary\ncanary", "token_type": "canary"}).to_string(),
            "MalformedResponse",
        ),
        ("moved", 302, "canary".to_owned(), "MalformedResponse"),
        ("quota", 429, "canary".to_owned(), "RateLimited"),
        ("down", 502, "canary".to_owned(), "ServerError"),
        (
            "stranger",
            200,
            jwt(json!({"iss": "canary", "sub": "canary", "aud": ["canary"]})),
            "TokenMismatch",
        ),
        ("nobody", 200, jwt(json!({"iss": 7, "aud": "canary"})), "TokenMismatch"),
    ];
    for (name, status, body, _) in &answers {
        let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
        world.key_secret(&format!("{name}-key"), &user).await;
        let headers = json!({"Location": "http://canary.example/", "X-Canary": "canary", "Server": "canary"});
        let fault = json!({"path": TOKEN, "userId": user.id, "status": status, "body": body, "headers": headers});
        world.issuer.fault(fault).await;
        let spec = one_token(&format!("{name}-token"));
        world.service_user(name, spec).await.expect("accepted");
    }
    for (name, _, _, reason) in &answers {
        let object = world.ready(name, "False", reason).await;
        assert!(
            condition(&object, "Ready").is_some_and(|(_, _, message)| !message.is_empty()),
            "{name}"
        );
    }

    // A `Date` so late that no later time can be represented.
    let headers = json!({"Date": "Thu, 30 Dec 9999 21:59:59 GMT", "Retry-After": "canary"});
    for path in [TOKEN, "/.well-known/openid-configuration"] {
        world.issuer.fault(json!({"path": path, "headers": headers})).await;
    }
    // A changed connection makes the operator run discovery again.
    let mut spec = world.instance_spec();
    spec["connection"]["timeout"] = json!("9s");
    world.apply_instance(spec).await.expect("an instance");
    world.instance_ready("False", "ClockSkew").await;
    world.simple("late", json!({"tokenType": "JWT"})).await;
    world.ready("late", "False", "ClockSkew").await;

    let events = Raw::at(
        &world,
        &format!("/apis/events.k8s.io/v1/namespaces/{}/events", world.name),
    );
    let (_, metrics) = operator.get("/metrics").await;
    let places = [
        ("status", Raw::users(&world).list().await.to_string()),
        ("Events", events.list().await.to_string()),
        ("Secrets", Raw::secrets(&world).list().await.to_string()),
        ("metrics", metrics),
        ("log", operator.log().join("\n")),
    ];
    for (place, text) in places {
        assert!(!text.to_lowercase().contains("canary"), "the {place} quotes an answer");
    }
    assert_no_panic(&operator);
    world.issuer.clear_faults().await;
    world.ready("late", "True", "Issued").await;
}

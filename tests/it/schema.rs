//! What the API server refuses at `kubectl apply`, with a sentence that names the field; and that the operator, which
//! may meet older CRDs, refuses the same.

use serde_json::{Value, json};
use zitadel_tokens::api::instance::ZitadelInstanceSpec;
use zitadel_tokens::api::service_user::ZitadelServiceUserSpec;
use zitadel_tokens::domain::validate;

use crate::support::cluster::Cluster;
use crate::support::world::{World, one_token};

/// A change to a good spec and, if it is to be refused, a word that both refusals say.
type Case = (&'static str, fn(&mut Value), Option<&'static str>);

#[rustfmt::skip]
const SERVICE_USERS: &[Case] = &[
    ("the good one", |_| {}, None),
    ("no audience", |s| s["tokens"][0]["projectIds"] = json!([]), Some("name at least one audience")),
    ("the API alone", |s| s["tokens"][0] = json!({"name": "t", "zitadelApi": true, "secret": {"name": "s"}}), None),
    ("the alias as a project", |s| s["tokens"][0]["projectIds"] = json!(["zitadel"]), Some("zitadelApi: true")),
    ("an id with a space", |s| s["tokens"][0]["projectIds"] = json!(["1:aud openid"]), Some("projectIds")),
    ("an id twice", |s| s["tokens"][0]["projectIds"] = json!(["1", "1"]), Some("projectIds")),
    ("33 ids", |s| s["tokens"][0]["projectIds"] = (0..33).map(|i| i.to_string()).collect(), Some("projectIds")),
    ("an odd organization", |s| s["tokens"][0]["organizationId"] = json!("1 2"), Some("organizationId")),
    ("an audience among the scopes", |s| s["tokens"][0]["scopes"] = json!(["urn:zitadel:iam:org:project:id:1:aud"]), Some("scopes")),
    ("two scopes in one", |s| s["tokens"][0]["scopes"] = json!(["openid email"]), Some("scopes")),
    ("known scopes", |s| s["tokens"][0]["scopes"] = json!(["urn:zitadel:iam:org:project:role:reader", "email"]), None),
    ("no further scope", |s| s["tokens"][0]["scopes"] = json!([]), None),
    ("no token", |s| s["tokens"] = json!([]), Some("spec.tokens")),
    ("a token's name in capitals", |s| s["tokens"][0]["name"] = json!("Main"), Some("name")),
    ("two tokens of one name", |s| {
        let other = json!({"name": "main", "projectIds": ["1"], "secret": {"name": "other-token"}});
        s["tokens"].as_array_mut().expect("a list").push(other);
    }, Some("spec.tokens")),
    ("17 tokens", |s| {
        let token = |i: usize| json!({"name": format!("t{i}"), "projectIds": ["1"], "secret": {"name": format!("s{i}")}});
        s["tokens"] = (0..17).map(token).collect();
    }, Some("spec.tokens")),
    ("the key's Secret as token Secret", |s| s["tokens"][0]["secret"]["name"] = json!("good-key"), Some("must differ")),
    ("a Secret with an odd name", |s| s["tokens"][0]["secret"]["name"] = json!("a..b"), Some("secret.name")),
    ("two tokens, one Secret", |s| {
        let other = json!({"name": "other", "projectIds": ["1"], "secret": {"name": "good-token"}});
        s["tokens"].as_array_mut().expect("a list").push(other);
    }, Some("two tokens name the same Secret")),
    ("two renewals", |s| {
        s["tokens"][0]["renewBefore"] = json!("5m");
        s["tokens"][0]["renewBeforePercentage"] = json!(20);
    }, Some("not both")),
    ("a duration", |s| s["tokens"][0]["renewBefore"] = json!("1h30m"), None),
    ("no duration", |s| s["tokens"][0]["renewBefore"] = json!("soon"), Some("renewBefore")),
    ("a duration of nothing", |s| s["tokens"][0]["renewBefore"] = json!("0s"), Some("renewBefore")),
    ("a duration of months", |s| s["tokens"][0]["renewBefore"] = json!("745h"), Some("renewBefore")),
    ("a hundred percent", |s| s["tokens"][0]["renewBeforePercentage"] = json!(100), Some("renewBeforePercentage")),
    ("a label of another tool", |s| s["tokens"][0]["secret"]["labels"] = json!({"argocd.argoproj.io/secret-type": "cluster"}), Some("labels")),
    ("an annotation of ours", |s| s["tokens"][0]["secret"]["annotations"] = json!({"zitadel-tokens.dev/record": "{}"}), Some("annotations")),
    ("an annotation of another tool in capitals", |s| s["tokens"][0]["secret"]["annotations"] = json!({"Kubernetes.io/x": ""}), Some("annotations")),
    ("a label of their own", |s| s["tokens"][0]["secret"]["labels"] = json!({"example.com/team": "shop", "team": "shop", "none": ""}), None),
    ("a label that is no value", |s| s["tokens"][0]["secret"]["labels"] = json!({"team": "the shop"}), Some("labels")),
    ("a key that is no key", |s| s["tokens"][0]["secret"]["labels"] = json!({"a/b/c": "x"}), Some("labels")),
    ("33 annotations", |s| s["tokens"][0]["secret"]["annotations"] = (0..33).map(|i| (format!("a{i}"), json!(""))).collect::<serde_json::Map<_, _>>().into(), Some("annotations")),
    ("a long annotation", |s| s["tokens"][0]["secret"]["annotations"] = json!({"a": "x".repeat(1025)}), Some("annotations")),
    ("a template over a key of ours", |s| s["tokens"][0]["secret"]["template"] = json!({"token": "x"}), Some("template")),
    ("a template for no key", |s| s["tokens"][0]["secret"]["template"] = json!({"..x": "x"}), Some("template")),
    ("a template", |s| s["tokens"][0]["secret"]["template"] = json!({"netrc": "{{ token }}", ".env": "T={{ token }}"}), None),
    ("a template that multiplies", |s| s["tokens"][0]["secret"]["template"] = json!({"x": "{{token}}".repeat(17)}), Some("template")),
    ("a long template", |s| s["tokens"][0]["secret"]["template"] = json!({"x": "x".repeat(16_385)}), Some("template")),
    ("a key entry with a slash", |s| s["keySecretRef"]["key"] = json!("a/b"), Some("keySecretRef.key")),
    ("an instance with an odd name", |s| s["instanceRef"]["name"] = json!("Main"), Some("instanceRef.name")),
];

#[rustfmt::skip]
const INSTANCES: &[Case] = &[
    ("the good one", |_| {}, None),
    ("http without leave", |s| s["connection"] = json!({}), Some("allowInsecureHttp")),
    ("http far away", |s| s["connection"]["endpoint"] = json!("http://auth.example.com"), Some("only to loopback")),
    ("http near", |s| s["connection"]["endpoint"] = json!("http://zitadel.zitadel.svc:8080"), None),
    ("http to a name that looks near", |s| s["connection"]["endpoint"] = json!("http://x.svc.example.com"), Some("only to loopback")),
    ("a trailing slash", |s| s["connection"]["endpoint"] = json!("https://auth.example.com/"), Some("spec.connection.endpoint")),
    ("a port out of range", |s| s["connection"]["endpoint"] = json!("https://auth.example.com:65536"), Some("spec.connection.endpoint")),
    ("a rule without selector", |s| s["access"] = json!([{"projectIds": ["1"]}]), Some("namespaceSelector")),
    ("a selector of nothing", |s| s["access"][0]["namespaceSelector"] = json!({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": []}]}), Some("namespaceSelector")),
    ("a selector that is none", |s| s["access"][0]["namespaceSelector"] = json!({"matchExpressions": [{"key": "a", "operator": "Like", "values": ["b"]}]}), Some("namespaceSelector")),
    ("every namespace", |s| s["access"][0]["namespaceSelector"] = json!({}), None),
    ("the alias as a project", |s| s["access"][0]["projectIds"] = json!(["zitadel"]), Some("zitadelApi: true")),
    ("a pattern as a project", |s| s["access"][0]["projectIds"] = json!(["1*"]), Some("projectIds")),
    ("an odd pinned id", |s| s["zitadelProjectId"] = json!("a b"), Some("zitadelProjectId")),
    ("a rate of zero", |s| s["connection"]["requestsPerSecond"] = json!(0), Some("requestsPerSecond")),
    ("a timeout", |s| s["connection"]["timeout"] = json!("60s"), None),
    ("a timeout too short", |s| s["connection"]["timeout"] = json!("500ms"), Some("spec.connection.timeout")),
    ("a timeout too long", |s| s["connection"]["timeout"] = json!("2m"), Some("spec.connection.timeout")),
    ("a proxy", |s| s["connection"]["proxy"] = json!("http://proxy.example.com:3128"), None),
    ("an odd proxy", |s| s["connection"]["proxy"] = json!("proxy:3128"), Some("spec.connection.proxy")),
    ("a proxy and a name for the certificate", |s| {
        s["connection"]["proxy"] = json!("https://proxy.example.com");
        s["connection"]["tlsServerName"] = json!("zitadel.example.com");
    }, Some("tlsServerName")),
    ("an odd CA entry", |s| s["connection"]["caConfigMapRef"] = json!({"name": "ca", "key": "a/b"}), Some("caConfigMapRef.key")),
    ("two CAs", |s| s["connection"] = json!({"allowInsecureHttp": true, "caBundle": "x", "caSecretRef": {"name": "y"}}), Some("caBundle")),
];

/// Issuers, of which an instance has only one: each has an instance of its own.
#[rustfmt::skip]
const ISSUERS: &[Case] = &[
    ("with a port", |s| s["issuer"] = json!("https://auth.example.com:8443"), None),
    ("with a trailing slash", |s| s["issuer"] = json!("https://auth.example.com/"), Some("spec.issuer")),
    ("with an upper-case host", |s| s["issuer"] = json!("https://Auth.example.com"), Some("spec.issuer")),
    ("with a path", |s| s["issuer"] = json!("https://auth.example.com/x"), Some("spec.issuer")),
    ("with userinfo", |s| s["issuer"] = json!("https://a@auth.example.com"), Some("spec.issuer")),
    ("with a query", |s| s["issuer"] = json!("https://auth.example.com?x"), Some("spec.issuer")),
    ("with the scheme's own port", |s| s["issuer"] = json!("https://auth.example.com:443"), Some("own port")),
    ("by http far away", |s| s["issuer"] = json!("http://auth.example.com"), Some("only to loopback")),
];

#[tokio::test(flavor = "multi_thread")]
async fn service_users() {
    let world = World::new("schema").await;
    let full = |mut spec: Value| {
        for (key, value) in [
            ("instanceRef", json!({"name": world.instance})),
            ("keySecretRef", json!({"name": "good-key"})),
        ] {
            if spec.get(key).is_none() {
                spec[key] = value;
            }
        }
        spec
    };
    for (name, change, refused) in SERVICE_USERS {
        let mut spec = full(one_token("good-token"));
        change(&mut spec);
        let here = read::<ZitadelServiceUserSpec>(&spec)
            .and_then(|s| validate::service_user("good", &s).map_err(|v| v.to_string()));
        judge(name, world.service_user("good", spec).await.map(drop), here, *refused);
    }
    let long = "n".repeat(64);
    let spec = read::<ZitadelServiceUserSpec>(&full(one_token("t"))).expect("a spec");
    let here = validate::service_user(&long, &spec).map_err(|v| v.to_string());
    let there = world.service_user(&long, one_token("t")).await.map(drop);
    judge("a long name", there, here, Some("at most 63 characters"));
}

#[tokio::test(flavor = "multi_thread")]
async fn instances() {
    let world = World::new("instance-schema").await;
    for (name, change, refused) in INSTANCES {
        let mut spec = world.instance_spec();
        change(&mut spec);
        let here =
            read::<ZitadelInstanceSpec>(&spec).and_then(|s| validate::instance("good", &s).map_err(|v| v.to_string()));
        judge(name, world.apply_instance(spec).await.map(drop), here, *refused);
    }
    let mut other = world.instance_spec();
    other["issuer"] = json!("https://other.example.com");
    // What changes cannot be seen in one object: the schema's alone.
    let there = world.apply_instance(other).await.map(drop);
    judge("another issuer", there, Err("immutable".into()), Some("immutable"));
    for (index, (name, change, refused)) in ISSUERS.iter().enumerate() {
        let beside = World::beside(&world, &index.to_string())
            .await
            .with_instance(&format!("{}-{index}", world.instance));
        let mut spec = world.instance_spec();
        change(&mut spec);
        let here =
            read::<ZitadelInstanceSpec>(&spec).and_then(|s| validate::instance("good", &s).map_err(|v| v.to_string()));
        judge(name, beside.apply_instance(spec).await.map(drop), here, *refused);
    }
}

/// What does not fit the types never reaches the operator's check: it is refused where it is read.
fn read<T: serde::de::DeserializeOwned>(spec: &Value) -> Result<T, String> {
    serde_json::from_value(spec.clone()).map_err(|error| error.to_string())
}

/// Both accept, or both refuse and say what.
fn judge(name: &str, there: kube::Result<()>, here: Result<(), String>, refused: Option<&str>) {
    let there = there.map_err(|error| match error {
        kube::Error::Api(status) => status.message.clone(),
        error => panic!("{name}: {error}"),
    });
    for (who, got) in [("the API server", there), ("the operator", here)] {
        match (got, refused) {
            (Ok(()), None) => {}
            (Ok(()), Some(_)) => panic!("{name}: {who} accepts it"),
            (Err(message), None) => panic!("{name}: {who} refuses it: {message}"),
            (Err(message), Some(word)) => assert!(message.contains(word), "{name}: {who} says: {message}"),
        }
    }
}

#[test]
fn the_schema_has_no_defaults_but_one_and_no_formats_that_the_api_server_does_not_know() {
    let crds = serde_json::to_string(&zitadel_tokens::api::crds()).expect("JSON");
    assert!(!crds.contains("uint"));
    // Defaults would show as drift in GitOps tools (eso#6798); the status needs its one (decision K9).
    assert_eq!(crds.matches("\"default\"").count(), 2);
    assert_eq!(crds.matches(r#""default":{"observedGeneration":-1}"#).count(), 2);
    assert!(
        !crds.contains("reference/") && !crds.contains("design §"),
        "users cannot look up our notes"
    );
}

#[test]
fn the_files_in_the_tree_are_what_the_binary_prints() {
    for (command, file) in [("crds", "crds/zitadel-tokens.yaml"), ("reasons", "docs/reasons.md")] {
        let printed = std::process::Command::new(crate::support::operator::binary())
            .arg(command)
            .output()
            .expect("runs");
        let path = format!("{}/{file}", env!("CARGO_MANIFEST_DIR"));
        let kept = std::fs::read_to_string(&path).expect("readable");
        assert!(
            kept == String::from_utf8_lossy(&printed.stdout),
            "{file} is out of date: make crds docs"
        );
    }
}

#[test]
fn kubectl_shows_the_columns() {
    let cluster = Cluster::shared();
    let Some(kubectl) = &cluster.kubectl else { return };
    let shown = std::process::Command::new(kubectl)
        .args(["get", "zsu", "--all-namespaces"])
        .env("KUBECONFIG", &cluster.kubeconfig)
        .output()
        .expect("kubectl runs");
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
}

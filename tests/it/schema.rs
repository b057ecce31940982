//! What the API server refuses at `kubectl apply`, with a sentence that names the field.

use serde_json::{Value, json};

use crate::support::cluster::Cluster;
use crate::support::world::{World, one_token};

/// A change to a good spec and, if it is to be refused, a piece of the sentence.
type Case = (&'static str, fn(&mut Value), Option<&'static str>);

#[tokio::test(flavor = "multi_thread")]
async fn service_users() {
    let world = World::new("schema").await;
    let cases: &[Case] = &[
        ("the good one", |_| {}, None),
        (
            "no audience",
            |s| s["tokens"][0]["projectIds"] = json!([]),
            Some("name at least one audience"),
        ),
        (
            "the API alone",
            |s| s["tokens"][0] = json!({"name": "t", "zitadelApi": true, "secret": {"name": "s"}}),
            None,
        ),
        (
            "the alias as a project",
            |s| s["tokens"][0]["projectIds"] = json!(["zitadel"]),
            Some("zitadelApi: true"),
        ),
        (
            "an id with a space",
            |s| s["tokens"][0]["projectIds"] = json!(["1:aud openid"]),
            Some("projectIds"),
        ),
        (
            "a scope that is none",
            |s| s["tokens"][0]["scopes"] = json!(["urn:zitadel:iam:org:project:id:1:aud"]),
            Some("scopes"),
        ),
        (
            "a known scope",
            |s| s["tokens"][0]["scopes"] = json!(["urn:zitadel:iam:org:project:role:reader", "email"]),
            None,
        ),
        ("no token", |s| s["tokens"] = json!([]), Some("tokens")),
        (
            "the key's Secret as token Secret",
            |s| s["tokens"][0]["secret"]["name"] = json!("good-key"),
            Some("must differ"),
        ),
        (
            "two tokens, one Secret",
            |s| {
                let other = json!({"name": "other", "projectIds": ["1"], "secret": {"name": "good-token"}});
                s["tokens"].as_array_mut().expect("a list").push(other);
            },
            Some("two tokens name the same Secret"),
        ),
        (
            "two renewals",
            |s| {
                s["tokens"][0]["renewBefore"] = json!("5m");
                s["tokens"][0]["renewBeforePercentage"] = json!(20);
            },
            Some("not both"),
        ),
        ("a duration", |s| s["tokens"][0]["renewBefore"] = json!("1h30m"), None),
        (
            "no duration",
            |s| s["tokens"][0]["renewBefore"] = json!("soon"),
            Some("renewBefore"),
        ),
        (
            "a label of another tool",
            |s| s["tokens"][0]["secret"]["labels"] = json!({"argocd.argoproj.io/secret-type": "cluster"}),
            Some("make other controllers act"),
        ),
        (
            "an annotation of ours",
            |s| s["tokens"][0]["secret"]["annotations"] = json!({"zitadel-tokens.dev/record": "{}"}),
            Some("make other controllers act"),
        ),
        (
            "a label of their own",
            |s| s["tokens"][0]["secret"]["labels"] = json!({"example.com/team": "shop", "team": "shop"}),
            None,
        ),
        (
            "a template over a key of ours",
            |s| s["tokens"][0]["secret"]["template"] = json!({"token": "x"}),
            Some("secret.template"),
        ),
        (
            "a template",
            |s| s["tokens"][0]["secret"]["template"] = json!({"netrc": "{{ token }}"}),
            None,
        ),
    ];
    for (name, change, refused) in cases {
        let mut spec = one_token("good-token");
        change(&mut spec);
        judge(name, world.service_user("good", spec).await.map(drop), *refused);
    }
    let long = "n".repeat(64);
    judge(
        "a long name",
        world.service_user(&long, one_token("t")).await.map(drop),
        Some("at most 63 characters"),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn instances() {
    let world = World::new("instance-schema").await;
    let cases: &[Case] = &[
        ("the good one", |_| {}, None),
        (
            "http without leave",
            |s| s["connection"] = json!({}),
            Some("allowInsecureHttp"),
        ),
        (
            "a trailing slash",
            |s| s["issuer"] = json!("https://auth.example.com/"),
            Some("spec.issuer"),
        ),
        (
            "an upper-case host",
            |s| s["issuer"] = json!("https://Auth.example.com"),
            Some("spec.issuer"),
        ),
        (
            "a path",
            |s| s["issuer"] = json!("https://auth.example.com/x"),
            Some("spec.issuer"),
        ),
        (
            "userinfo",
            |s| s["issuer"] = json!("https://a@auth.example.com"),
            Some("spec.issuer"),
        ),
        (
            "the scheme's own port",
            |s| s["issuer"] = json!("https://auth.example.com:443"),
            Some("own port"),
        ),
        (
            "another issuer",
            |s| s["issuer"] = json!("https://other.example.com"),
            Some("immutable"),
        ),
        (
            "a rule without selector",
            |s| s["access"] = json!([{"projectIds": ["1"]}]),
            Some("namespaceSelector"),
        ),
        (
            "the alias as a project",
            |s| s["access"][0]["projectIds"] = json!(["zitadel"]),
            Some("zitadelApi: true"),
        ),
        (
            "a rate of zero",
            |s| s["connection"]["requestsPerSecond"] = json!(0),
            Some("requestsPerSecond"),
        ),
    ];
    for (name, change, refused) in cases {
        let mut spec = world.instance_spec();
        change(&mut spec);
        judge(name, world.apply_instance(spec).await.map(drop), *refused);
    }
}

fn judge(name: &str, got: kube::Result<()>, refused: Option<&str>) {
    match (got, refused) {
        (Ok(()), None) => {}
        (Ok(()), Some(_)) => panic!("{name}: was accepted"),
        (Err(kube::Error::Api(status)), Some(sentence)) => {
            assert!(status.message.contains(sentence), "{name}: {}", status.message);
        }
        (Err(error), _) => panic!("{name}: {error}"),
    }
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

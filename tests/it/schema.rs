//! Validation. The API server refuses invalid objects at `kubectl apply` with a message that names the field. The
//! operator refuses the same objects by itself, because the CRDs of a cluster may be older than the operator.

use kube::api::{ApiResource, DynamicObject, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use zitadel_tokens::api::{SCHEMA_VERSION, ZitadelAccessPolicy, ZitadelInstance, ZitadelServiceUser, crds};
use zitadel_tokens::domain::allow_list::AllowList;
use zitadel_tokens::domain::validate;

use crate::support::world::{World, everything, one_token};

/// The name of a case, a change to a valid object and, if the change makes it invalid, a part of both messages.
type Case = (&'static str, fn(&mut Value), Option<&'static str>);

/// A change that only the API server refuses, and a part of its error message.
type Refused = (fn(&mut Value), &'static str);

/// Checks each case with the API server, by a dry run.
async fn assert_cases(api: &Api<DynamicObject>, good: &Value, cases: &[Case]) {
    let params = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let mut wrong = Vec::new();
    for (name, change, refused) in cases {
        let mut object = good.clone();
        change(&mut object);
        let object = serde_json::from_value(object).expect("an object");
        let error = match api.create(&params, &object).await {
            Ok(_) => None,
            Err(kube::Error::Api(status)) => Some(status.message.clone()),
            Err(error) => panic!("{name}: {error}"),
        };
        let agrees = match (&error, refused) {
            (None, None) => true,
            (Some(error), Some(piece)) => error.contains(piece),
            _ => false,
        };
        if !agrees {
            wrong.push(format!("{name}: {error:.600?}, not {refused:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn spec(object: &mut Value) -> &mut Value {
    &mut object["spec"]
}

/// Replaces the key by a user.
fn user(object: &mut Value, user: Value) {
    let spec = object["spec"].as_object_mut().expect("an object");
    spec.remove("keySecretRef");
    spec.insert("user".into(), user);
}

fn roles(object: &mut Value, roles: Value) {
    spec(object)["managerRoles"] = roles;
}

/// The first token.
fn token(object: &mut Value) -> &mut Value {
    &mut object["spec"]["tokens"][0]
}

/// The first token's Secret.
fn secret(object: &mut Value) -> &mut Value {
    &mut object["spec"]["tokens"][0]["secret"]
}

fn label(object: &mut Value, key: &str, value: &str) {
    secret(object)["labels"] = entry(key, value);
}

fn annotation(object: &mut Value, key: &str, value: &str) {
    secret(object)["annotations"] = entry(key, value);
}

fn template(object: &mut Value, key: &str, value: &str) {
    secret(object)["template"] = entry(key, value);
}

/// Replaces the policy's selector.
fn selects(object: &mut Value, selector: Value) {
    object["spec"]["namespaceSelector"] = selector;
}

/// Replaces the policy's selector by this requirement.
fn requires(object: &mut Value, requirement: &Value) {
    selects(object, json!({"matchExpressions": [requirement]}));
}

/// A list of `count` different texts.
fn many(count: usize) -> Value {
    (0..count).map(|i| format!("e{i}")).collect()
}

/// A map of `count` entries with this text.
fn map(count: usize, text: &str) -> Value {
    let entries = (0..count).map(|i| (format!("e{i}"), json!(text)));
    Value::Object(entries.collect())
}

fn entry(key: &str, value: &str) -> Value {
    Value::Object([(key.to_owned(), json!(value))].into_iter().collect())
}

/// Two tokens whose Secrets have these entries in `field`.
fn in_two_secrets(object: &mut Value, field: &str, entries: &Value) {
    spec(object)["tokens"] = tokens(2);
    for i in 0..2 {
        spec(object)["tokens"][i]["secret"][field] = entries.clone();
    }
}

/// `count` different tokens.
fn tokens(count: usize) -> Value {
    let token = |i| json!({"name": format!("t{i}"), "projectIDs": ["1"], "secret": {"name": format!("s{i}")}});
    (0..count).map(token).collect()
}

#[rustfmt::skip]
const USERS: &[Case] = &[
    ("unchanged", |_| {}, None),
    ("a name of 63", |o| o["metadata"]["name"] = json!("n".repeat(63)), None),
    ("a name of 64", |o| o["metadata"]["name"] = json!("n".repeat(64)), Some("metadata.name")),
    ("no token", |o| spec(o)["tokens"] = json!([]), Some("spec.tokens")),
    ("16 tokens", |o| spec(o)["tokens"] = tokens(16), None),
    ("17 tokens", |o| spec(o)["tokens"] = tokens(17), Some("spec.tokens")),
    ("a token's name with a dot", |o| token(o)["name"] = json!("a.b"), Some("spec.tokens[0].name")),
    ("a token's name of 64", |o| token(o)["name"] = json!("n".repeat(64)), Some("spec.tokens[0].name")),
    ("a token with an empty name", |o| token(o)["name"] = json!(""), Some("spec.tokens[0].name")),
    ("two tokens with one name", |o| { spec(o)["tokens"] = tokens(2); spec(o)["tokens"][1]["name"] = json!("t0"); }, Some("spec.tokens[")),
    ("an instance's name with two dots", |o| spec(o)["instanceRef"]["name"] = json!("a..b"), Some("spec.instanceRef.name")),
    ("an instance's name of 64", |o| spec(o)["instanceRef"]["name"] = json!("n".repeat(64)), Some("spec.instanceRef.name")),
    ("a user instead of a key", |o| user(o, json!({"organizationID": "1", "username": "ci-bot@example.com"})), None),
    ("a user and a key", |o| spec(o)["user"] = json!({"organizationID": "1"}), Some("set exactly one of keySecretRef and user")),
    ("neither a user nor a key", |o| { spec(o).as_object_mut().expect("an object").remove("keySecretRef"); }, Some("set exactly one of keySecretRef and user")),
    ("an organization with a space", |o| user(o, json!({"organizationID": "1 2"})), Some("spec.user.organizationID")),
    ("a username with a space", |o| user(o, json!({"organizationID": "1", "username": "a b"})), Some("spec.user.username")),
    ("a username of 201", |o| user(o, json!({"organizationID": "1", "username": "a".repeat(201)})), Some("spec.user.username")),
    ("an existing user", |o| user(o, json!({"organizationID": "1", "existingUserID": "2"})), None),
    ("an existing user with a slash", |o| user(o, json!({"organizationID": "1", "existingUserID": "../2"})), Some("spec.user.existingUserID")),
    ("an existing user with a name", |o| user(o, json!({"organizationID": "1", "existingUserID": "2", "username": "a"})), Some("spec.user.username: cannot be combined with existingUserID")),
    ("a key Secret in upper case", |o| spec(o)["keySecretRef"]["name"] = json!("Key"), Some("spec.keySecretRef.name")),
    ("a key Secret of 254", |o| spec(o)["keySecretRef"]["name"] = json!("n".repeat(254)), Some("spec.keySecretRef.name")),
    ("a key Secret in another namespace", |o| spec(o)["keySecretRef"]["name"] = json!("other/key"), Some("spec.keySecretRef.name")),
    ("an entry", |o| spec(o)["keySecretRef"]["key"] = json!("_My.key-1.json"), None),
    ("an entry with a slash", |o| spec(o)["keySecretRef"]["key"] = json!("a/b"), Some("spec.keySecretRef.key")),
    ("an empty entry name", |o| spec(o)["keySecretRef"]["key"] = json!(""), Some("spec.keySecretRef.key")),
    ("an entry of null", |o| spec(o)["keySecretRef"]["key"] = Value::Null, None),

    ("roles at each level", |o| roles(o, json!([
        {"instance": true, "roles": ["IAM_OWNER"]}, {"organizationID": "1", "roles": ["ORG_OWNER", "ORG_OWNER_VIEWER"], "mode": "Exclusive"},
        {"organizationID": "2", "roles": ["ORG_OWNER"], "mode": "Merge"}, {"projectID": "1", "roles": ["PROJECT_OWNER"]},
        {"projectID": "1", "grantedOrganizationID": "1", "roles": ["PROJECT_GRANT_OWNER"]}, {"projectID": "1", "grantedOrganizationID": "2", "roles": ["PROJECT_GRANT_OWNER"]},
    ])), None),
    ("roles without a scope", |o| roles(o, json!([{"roles": ["ORG_OWNER"]}])), Some("]: set exactly one of instance: true, organizationID and projectID")),
    ("roles with two scopes", |o| roles(o, json!([{"organizationID": "1", "projectID": "1", "roles": ["ORG_OWNER"]}])), Some("set exactly one of instance: true, organizationID and projectID")),
    ("roles of instance false", |o| roles(o, json!([{"instance": false, "roles": ["IAM_OWNER"]}])), Some("set exactly one of instance: true, organizationID and projectID")),
    ("roles of a grant without project", |o| roles(o, json!([{"organizationID": "1", "grantedOrganizationID": "2", "roles": ["ORG_OWNER"]}])), Some(".grantedOrganizationID: also set projectID")),
    ("a role of another level", |o| roles(o, json!([{"organizationID": "1", "roles": ["IAM_OWNER"]}])), Some(".roles: roles of the instance begin with IAM_")),
    ("a role of a grant for a project", |o| roles(o, json!([{"projectID": "1", "roles": ["PROJECT_GRANT_OWNER"]}])), Some(".roles: roles of the instance begin with IAM_")),
    ("a role of a project for a grant", |o| roles(o, json!([{"projectID": "1", "grantedOrganizationID": "1", "roles": ["PROJECT_OWNER"]}])), Some(".roles: roles of the instance begin with IAM_")),
    ("a role in lower case", |o| roles(o, json!([{"organizationID": "1", "roles": ["ORG_owner"]}])), Some("spec.managerRoles[0].roles")),
    ("a role of 65", |o| roles(o, json!([{"organizationID": "1", "roles": [format!("ORG_{}", "A".repeat(61))]}])), Some("spec.managerRoles[0].roles")),
    ("roles without a name", |o| roles(o, json!([{"organizationID": "1", "roles": []}])), Some("spec.managerRoles[0].roles")),
    ("a role twice", |o| roles(o, json!([{"organizationID": "1", "roles": ["ORG_OWNER", "ORG_OWNER"]}])), Some("spec.managerRoles[0].roles[1]")),
    ("roles of an organization with a space", |o| roles(o, json!([{"organizationID": "1 2", "roles": ["ORG_OWNER"]}])), Some("spec.managerRoles[0].organizationID")),
    ("roles of a project of 65", |o| roles(o, json!([{"projectID": "1".repeat(65), "roles": ["PROJECT_OWNER"]}])), Some("spec.managerRoles[0].projectID")),
    ("one scope twice", |o| roles(o, json!([{"organizationID": "1", "roles": ["ORG_OWNER"]}, {"organizationID": "1", "roles": ["ORG_OWNER_VIEWER"]}])), Some("list each instance, organization, project and project grant only once")),
    ("one grant twice", |o| roles(o, json!([{"projectID": "1", "grantedOrganizationID": "1", "roles": ["PROJECT_GRANT_OWNER"]}, {"projectID": "1", "grantedOrganizationID": "1", "roles": ["PROJECT_GRANT_OWNER_VIEWER"]}])), Some("only once")),
    ("17 entries of roles", |o| roles(o, (0..17).map(|i| json!({"organizationID": i.to_string(), "roles": ["ORG_OWNER"]})).collect()), Some("spec.managerRoles")),

    ("a rotation", |o| spec(o)["keyRotation"] = json!({"interval": "1h"}), None),
    ("a rotation with everything", |o| spec(o)["keyRotation"] = json!({"interval": "720h", "overlap": "24h", "keyLifetime": "745h", "deleteBootstrapKey": true}), None),
    ("an interval below an hour", |o| spec(o)["keyRotation"] = json!({"interval": "59m"}), Some("keyRotation.interval: must be at least 1h")),
    ("an interval above a year", |o| spec(o)["keyRotation"] = json!({"interval": "8761h"}), Some("keyRotation.interval: must be at least 1h")),
    ("an interval in days", |o| spec(o)["keyRotation"] = json!({"interval": "30d"}), Some("spec.keyRotation.interval")),
    ("an overlap below ten seconds", |o| spec(o)["keyRotation"] = json!({"interval": "1h", "overlap": "9s"}), Some("keyRotation.overlap: must be at least 10s")),
    ("an overlap as long as the interval", |o| spec(o)["keyRotation"] = json!({"interval": "1h", "overlap": "1h"}), Some("keyRotation.overlap: must be at least 10s")),
    ("a lifetime of interval and overlap", |o| spec(o)["keyRotation"] = json!({"interval": "24h", "overlap": "2h", "keyLifetime": "26h"}), Some("keyRotation.keyLifetime: must be longer")),
    ("a lifetime of interval and default overlap", |o| spec(o)["keyRotation"] = json!({"interval": "24h", "keyLifetime": "25h"}), Some("keyRotation.keyLifetime: must be longer")),
    ("a lifetime above three years", |o| spec(o)["keyRotation"] = json!({"interval": "24h", "keyLifetime": "26281h"}), Some("keyRotation.keyLifetime: must be longer")),
    ("keys that stay", |o| spec(o)["deletionPolicy"] = json!("Orphan"), None),

    ("no audience", |o| token(o)["projectIDs"] = json!([]), Some("name at least one audience")),
    ("only the ZITADEL API", |o| *token(o) = json!({"name": "t", "zitadelAPI": true, "secret": {"name": "s"}}), None),
    ("zitadelAPI: false and no project", |o| *token(o) = json!({"name": "t", "zitadelAPI": false, "secret": {"name": "s"}}), Some("name at least one audience")),
    ("the alias as a project", |o| token(o)["projectIDs"] = json!(["zitadel"]), Some("zitadelAPI: true")),
    ("32 projects", |o| token(o)["projectIDs"] = many(32), None),
    ("33 projects", |o| token(o)["projectIDs"] = many(33), Some("spec.tokens[0].projectIDs")),
    ("a project twice", |o| token(o)["projectIDs"] = json!(["1", "1"]), Some("spec.tokens[0].projectIDs")),
    ("an id with a space", |o| token(o)["projectIDs"] = json!(["1:aud openid"]), Some("spec.tokens[0].projectIDs")),
    ("an id with a line break", |o| token(o)["projectIDs"] = json!(["1\n"]), Some("spec.tokens[0].projectIDs")),
    ("an id of 64", |o| token(o)["projectIDs"] = json!(["1".repeat(64)]), None),
    ("an id of 65", |o| token(o)["projectIDs"] = json!(["1".repeat(65)]), Some("spec.tokens[0].projectIDs")),
    ("an empty id", |o| token(o)["projectIDs"] = json!([""]), Some("spec.tokens[0].projectIDs")),
    ("an organization", |o| token(o)["organizationID"] = json!("7"), None),
    ("an invalid organization", |o| token(o)["organizationID"] = json!("7:x"), Some("spec.tokens[0].organizationID")),
    ("an empty organization", |o| token(o)["organizationID"] = json!(""), Some("spec.tokens[0].organizationID")),
    ("known scopes", |o| token(o)["scopes"] = json!(["openid", "profile", "email", "phone", "address",
        "urn:zitadel:iam:user:metadata", "urn:zitadel:iam:user:resourceowner", "urn:zitadel:iam:org:project:role:a.b_c:d-e",
        "urn:zitadel:iam:org:roles:id:7", "urn:zitadel:iam:org:domain:primary:example.com"]), None),
    ("no scope", |o| token(o)["scopes"] = json!([]), None),
    ("an audience as scope", |o| token(o)["scopes"] = json!(["urn:zitadel:iam:org:project:id:1:aud"]), Some("spec.tokens[0].scopes")),
    ("an organization as scope", |o| token(o)["scopes"] = json!(["urn:zitadel:iam:org:id:1"]), Some("spec.tokens[0].scopes")),
    ("offline access", |o| token(o)["scopes"] = json!(["offline_access"]), Some("spec.tokens[0].scopes")),
    ("two scopes in one", |o| token(o)["scopes"] = json!(["openid email"]), Some("spec.tokens[0].scopes")),
    ("an empty role", |o| token(o)["scopes"] = json!(["urn:zitadel:iam:org:project:role:"]), Some("spec.tokens[0].scopes")),
    ("a scope in upper case", |o| token(o)["scopes"] = json!(["OpenID"]), Some("spec.tokens[0].scopes")),
    ("a scope of 256", |o| token(o)["scopes"] = json!([format!("urn:zitadel:iam:org:roles:id:{}", "7".repeat(227))]), None),
    ("a scope of 257", |o| token(o)["scopes"] = json!([format!("urn:zitadel:iam:org:roles:id:{}", "7".repeat(228))]), Some("spec.tokens[0].scopes")),
    ("17 scopes", |o| token(o)["scopes"] = json!(vec!["openid"; 17]), Some("spec.tokens[0].scopes")),

    ("two refresh times", |o| { token(o)["renewBefore"] = json!("5m"); token(o)["renewBeforePercentage"] = json!(20); }, Some("not both")),
    ("durations in any order", |o| token(o)["renewBefore"] = json!("30m1.5h250ms"), None),
    ("an invalid duration", |o| token(o)["renewBefore"] = json!("soon"), Some("spec.tokens[0].renewBefore")),
    ("a duration in days", |o| token(o)["renewBefore"] = json!("1d"), Some("spec.tokens[0].renewBefore")),
    ("a negative duration", |o| token(o)["renewBefore"] = json!("-1h"), Some("spec.tokens[0].renewBefore")),
    ("a zero duration", |o| token(o)["renewBefore"] = json!("0s"), Some("spec.tokens[0].renewBefore")),
    ("31 days", |o| token(o)["renewBefore"] = json!("744h"), None),
    ("more than 31 days", |o| token(o)["renewBefore"] = json!("744h1ms"), Some("spec.tokens[0].renewBefore")),
    ("an overflowing duration", |o| token(o)["renewBefore"] = json!("9999999999999999999h"), Some("spec.tokens[0].renewBefore")),
    ("a percentage of 0", |o| token(o)["renewBeforePercentage"] = json!(0), Some("spec.tokens[0].renewBeforePercentage")),
    ("a percentage of 99", |o| token(o)["renewBeforePercentage"] = json!(99), None),
    ("a percentage of 100", |o| token(o)["renewBeforePercentage"] = json!(100), Some("spec.tokens[0].renewBeforePercentage")),
    ("renewBefore of null", |o| { token(o)["renewBefore"] = Value::Null; token(o)["renewBeforePercentage"] = json!(20); }, None),
];

#[rustfmt::skip]
const SECRETS: &[Case] = &[
    ("a Secret with two dots", |o| secret(o)["name"] = json!("a..b"), Some("spec.tokens[0].secret.name")),
    ("a Secret that ends in a dash", |o| secret(o)["name"] = json!("a-"), Some("spec.tokens[0].secret.name")),
    ("a Secret of 253", |o| secret(o)["name"] = json!("n".repeat(253)), None),
    ("a Secret of 254", |o| secret(o)["name"] = json!("n".repeat(254)), Some("spec.tokens[0].secret.name")),
    ("the key's Secret", |o| secret(o)["name"] = json!("key"), Some("must differ")),
    ("two tokens, one Secret", |o| { spec(o)["tokens"] = tokens(2); spec(o)["tokens"][1]["secret"]["name"] = json!("s0"); }, Some("two tokens name the same Secret")),

    ("custom labels", |o| secret(o)["labels"] = json!({"example.com/team": "shop", "team": "", "A_b.c-1": "A_b.c-1"}), None),
    ("custom annotations", |o| secret(o)["annotations"] = json!({"example.com/note": "any text: {}", "note": ""}), None),
    ("labels allowed by default", |o| secret(o)["labels"] = json!({"app.kubernetes.io/part-of": "y", "reloader.stakater.com/match": "true"}), None),
    ("keys that resemble the operator's", |o| secret(o)["labels"] = json!({"myzitadel-tokens.dev/x": "y", "zitadel-tokens.dev": "y"}), None),
    ("a label prefix in upper case", |o| label(o, "Kubernetes.io/x", "y"), Some("spec.tokens[0].secret.labels")),
    ("an annotation prefix in upper case", |o| annotation(o, "Replicator.V1.Mittwald.DE/replicate-to", "*"), Some("spec.tokens[0].secret.annotations")),
    ("a prefix that ends in a dot", |o| annotation(o, "example.com./x", "y"), Some("spec.tokens[0].secret.annotations")),
    ("an annotation of the operator", |o| annotation(o, "zitadel-tokens.dev/record", "{}"), Some("reserved for the operator")),
    ("a label in a subdomain of the operator's", |o| label(o, "a.zitadel-tokens.dev/x", "y"), Some("reserved for the operator")),
    ("the managed-by label", |o| label(o, "app.kubernetes.io/managed-by", "Helm"), Some("reserved for the operator")),
    ("two slashes", |o| annotation(o, "example.com/a/b", "c"), Some("spec.tokens[0].secret.annotations")),
    ("a key without a name", |o| annotation(o, "example.com/", "c"), Some("spec.tokens[0].secret.annotations")),
    ("a key without a prefix", |o| annotation(o, "/a", "c"), Some("spec.tokens[0].secret.annotations")),
    ("an empty key", |o| annotation(o, "", "c"), Some("spec.tokens[0].secret.annotations")),
    ("a key with a space", |o| label(o, "a b", "c"), Some("spec.tokens[0].secret.labels")),
    ("a key with a line break", |o| label(o, "a\n", "c"), Some("spec.tokens[0].secret.labels")),
    ("a name of 63 after a prefix of 253", |o| label(o, &format!("{}/{}", "p".repeat(253), "n".repeat(63)), "c"), None),
    ("a key of 64", |o| label(o, &"n".repeat(64), "c"), Some("spec.tokens[0].secret.labels")),
    ("a prefix of 254", |o| label(o, &format!("{}/n", "p".repeat(254)), "c"), Some("spec.tokens[0].secret.labels")),
    ("a value of 63", |o| label(o, "a", &"v".repeat(63)), None),
    ("a value of 64", |o| label(o, "a", &"v".repeat(64)), Some("spec.tokens[0].secret.labels")),
    ("a value that ends in a dash", |o| label(o, "a", "v-"), Some("spec.tokens[0].secret.labels")),
    ("a value with a space", |o| label(o, "a", "v v"), Some("spec.tokens[0].secret.labels")),
    ("32 labels", |o| secret(o)["labels"] = map(32, "v"), None),
    ("33 labels", |o| secret(o)["labels"] = map(33, "v"), Some("spec.tokens[0].secret.labels")),
    ("31 annotations of 1024 characters", |o| secret(o)["annotations"] = map(31, &"ü".repeat(1024)), None),
    ("annotations of more than 64 KiB", |o| secret(o)["annotations"] = map(32, &"ü".repeat(1024)), Some("spec.tokens[].secret.annotations")),
    ("annotations of two tokens of more than 64 KiB", |o| in_two_secrets(o, "annotations", &map(32, &"x".repeat(1024))), Some("spec.tokens[].secret.annotations")),
    ("templates of more than 64 KiB", |o| secret(o)["template"] = map(5, &"ü".repeat(8_000)), Some("spec.tokens[].secret.template")),
    ("templates of two tokens of more than 64 KiB", |o| in_two_secrets(o, "template", &map(5, &"x".repeat(8_000))), Some("spec.tokens[].secret.template")),
    ("templates of two tokens of less than 64 KiB", |o| in_two_secrets(o, "template", &map(4, &"x".repeat(8_000))), None),
    ("33 annotations", |o| secret(o)["annotations"] = map(33, "v"), Some("spec.tokens[0].secret.annotations")),
    ("an annotation of 1025", |o| annotation(o, "a", &"v".repeat(1025)), Some("spec.tokens[0].secret.annotations")),

    ("templates", |o| secret(o)["template"] = json!({".netrc": "machine x password {{ token }}", "A-b_c.d": ""}), None),
    ("a template named token", |o| template(o, "token", "x"), Some("spec.tokens[0].secret.template")),
    ("a template named token_type", |o| template(o, "token_type", "x"), Some("spec.tokens[0].secret.template")),
    ("a template named expires_at", |o| template(o, "expires_at", "x"), Some("spec.tokens[0].secret.template")),
    ("a template named issuer", |o| template(o, "issuer", "x"), Some("spec.tokens[0].secret.template")),
    ("a template named audience", |o| template(o, "audience", "{{ audience }}"), None),
    ("a template with a slash", |o| template(o, "a/b", "x"), Some("spec.tokens[0].secret.template")),
    ("a template named by a dot", |o| template(o, ".", "x"), Some("spec.tokens[0].secret.template")),
    ("a template named ..data", |o| template(o, "..data", "x"), Some("spec.tokens[0].secret.template")),
    ("a template with an empty name", |o| template(o, "", "x"), Some("spec.tokens[0].secret.template")),
    ("a template's name of 254", |o| template(o, &"n".repeat(254), "x"), Some("spec.tokens[0].secret.template")),
    ("32 templates", |o| secret(o)["template"] = map(32, "x"), None),
    ("33 templates", |o| secret(o)["template"] = map(33, "x"), Some("spec.tokens[0].secret.template")),
    ("a template of 16384 characters", |o| template(o, "a", &"ü".repeat(16_384)), None),
    ("a template of 16385", |o| template(o, "a", &"x".repeat(16_385)), Some("spec.tokens[0].secret.template")),
    ("16 placeholders", |o| template(o, "a", &"{{ token }}".repeat(16)), None),
    ("17 placeholders", |o| template(o, "a", &"{{ token }}".repeat(17)), Some("spec.tokens[0].secret.template")),
];

/// An allow list with the keys of the cases.
fn allowed() -> AllowList {
    let mut keys: Vec<String> = (0..33).map(|i| format!("e{i}")).collect();
    keys.push(format!("{}/*", "p".repeat(253)));
    let more = [
        "example.com/*",
        "myzitadel-tokens.dev/*",
        "zitadel-tokens.dev",
        "team",
        "A_b.c-1",
        "note",
        "a",
    ];
    keys.extend(more.map(str::to_owned));
    AllowList::with(&keys).expect("well-formed")
}

/// The schema is the same in all clusters, so it cannot contain a platform team's allow list. The operator and the
/// chart's admission policy (chart/metadata.rs) apply the list.
#[tokio::test(flavor = "multi_thread")]
async fn operator_refuses_unlisted_metadata_keys_that_the_schema_accepts() {
    let world = World::new("schema-keys").await;
    let dry_run = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    for key in [
        "owner",
        "app.kubernetes.io/instance",
        "argocd.argoproj.io/secret-type",
        "istio/multiCluster",
    ] {
        for (change, field) in [
            (label as fn(&mut Value, &str, &str), "labels"),
            (annotation, "annotations"),
        ] {
            let mut object = good();
            change(&mut object, key, "x");
            let user: ZitadelServiceUser = serde_json::from_value(object).expect("a service user");
            let message = validate::token(&user.spec, 0, &allowed()).expect_err(key).to_string();
            let expected =
                format!("spec.tokens[0].secret.{field}: `{key}` is not among the keys that the platform team allows");
            assert!(message.starts_with(&expected), "{message}");
            world.users().create(&dry_run, &user).await.expect(key);
        }
    }
}

fn good() -> Value {
    let mut spec = one_token("good-token");
    spec["instanceRef"] = json!({"name": "main"});
    spec["keySecretRef"] = json!({"name": "key"});
    json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser",
        "metadata": {"name": "good"}, "spec": spec,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn crd_refuses_invalid_service_users() {
    let world = World::new("schema").await;
    let resource = ApiResource::erase::<ZitadelServiceUser>(&());
    let api = Api::namespaced_with(world.client.clone(), &world.name, &resource);
    assert_cases(&api, &good(), USERS).await;
    assert_cases(&api, &good(), SECRETS).await;
}

/// Names of the cases in [`USERS`] and [`SECRETS`] that guard a key, an access, or the operator's memory.
#[rustfmt::skip]
const GUARDED: &[&str] = &[
    "a token's name with a dot",
    "a token's name of 64",
    "a token with an empty name",
    "a user and a key",
    "neither a user nor a key",
    "an organization with a space",
    "a username with a space",
    "a username of 201",
    "an existing user with a slash",
    "an existing user with a name",
    "a key Secret in upper case",
    "a key Secret of 254",
    "a key Secret in another namespace",
    "roles without a scope",
    "roles with two scopes",
    "roles of instance false",
    "roles of a grant without project",
    "a role of another level",
    "a role of a grant for a project",
    "a role of a project for a grant",
    "a role in lower case",
    "a role of 65",
    "roles without a name",
    "roles of an organization with a space",
    "roles of a project of 65",
    "one scope twice",
    "one grant twice",
    "17 entries of roles",
    "no audience",
    "zitadelAPI: false and no project",
    "the alias as a project",
    "33 projects",
    "an id with a space",
    "an id with a line break",
    "an id of 65",
    "an empty id",
    "an invalid organization",
    "an empty organization",
    "an audience as scope",
    "an organization as scope",
    "offline access",
    "two scopes in one",
    "an empty role",
    "a scope in upper case",
    "a scope of 257",
    "17 scopes",
    "a Secret with two dots",
    "a Secret that ends in a dash",
    "a Secret of 254",
    "the key's Secret",
    "two tokens, one Secret",
    "a label prefix in upper case",
    "an annotation prefix in upper case",
    "a prefix that ends in a dot",
    "an annotation of the operator",
    "a label in a subdomain of the operator's",
    "the managed-by label",
    "two slashes",
    "a key without a name",
    "a key without a prefix",
    "an empty key",
    "a key with a space",
    "a key with a line break",
    "a key of 64",
    "a prefix of 254",
    "a value of 64",
    "a value that ends in a dash",
    "a value with a space",
    "annotations of more than 64 KiB",
    "annotations of two tokens of more than 64 KiB",
    "templates of more than 64 KiB",
    "templates of two tokens of more than 64 KiB",
    "a template named token",
    "a template named token_type",
    "a template named expires_at",
    "a template named issuer",
    "a template with a slash",
    "a template named by a dot",
    "a template named ..data",
    "a template with an empty name",
    "a template's name of 254",
    "33 templates",
    "17 placeholders",
];

#[test]
fn operator_refuses_by_itself_what_guards_a_key_an_access_or_its_memory() {
    let mut refused = Vec::new();
    for (name, change, piece) in USERS.iter().chain(SECRETS) {
        let mut object = good();
        change(&mut object);
        let user: ZitadelServiceUser = serde_json::from_value(object).expect("a service user");
        let spec = &user.spec;
        let violation = (0..spec.tokens.len()).find_map(|index| validate::token(spec, index, &allowed()).err());
        let violation = violation.or(validate::manager_roles(spec).err());
        if let Some(violation) = violation.map(|violation| violation.to_string()) {
            assert!(
                piece.is_some_and(|piece| violation.contains(piece)),
                "{name}: {violation}, not {piece:?}"
            );
            refused.push(*name);
        }
    }
    assert_eq!(refused, GUARDED);
}

/// Hash of the schema of version 1, without descriptions.
const SCHEMA: (u32, &str) = (1, "d816966a1faac4f51ccea0d240e58912");

/// An operator must be able to tell that the installed CRDs are older than it.
#[test]
fn schema_version_rises_with_the_schema() {
    let mut schema = serde_json::to_value(crds().into_iter().map(|crd| crd.spec).collect::<Vec<_>>()).expect("JSON");
    without_descriptions(&mut schema);
    let hash = zitadel_tokens::domain::hash::of([schema.to_string().as_bytes()]);
    let same = SCHEMA == (SCHEMA_VERSION, &*hash);
    assert!(
        same,
        "the schema changed: raise SCHEMA_VERSION once per release, and set SCHEMA to {hash:?}"
    );
}

fn without_descriptions(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, value| key != "description" || value.is_object());
            map.values_mut().for_each(without_descriptions);
        }
        Value::Array(list) => list.iter_mut().for_each(without_descriptions),
        _ => {}
    }
}

/// Sets the issuer of an instance.
fn issuer(object: &mut Value, issuer: &str) {
    object["spec"]["issuer"] = json!(issuer);
}

fn connection(object: &mut Value, field: &str, value: Value) {
    object["spec"]["connection"][field] = value;
}

#[rustfmt::skip]
const INSTANCES: &[Case] = &[
    ("unchanged", |_| {}, None),
    ("a name of 64", |o| o["metadata"]["name"] = json!("n".repeat(64)), Some("metadata.name")),
    ("https", |o| *spec(o) = json!({"issuer": "https://auth.example.com"}), None),
    ("a port", |o| issuer(o, "https://auth.example.com:65535"), None),
    ("a port above 65535", |o| issuer(o, "https://auth.example.com:65536"), Some("spec.issuer")),
    ("a port of six digits", |o| issuer(o, "https://auth.example.com:100000"), Some("spec.issuer")),
    ("a port of 0", |o| issuer(o, "https://auth.example.com:0"), Some("spec.issuer")),
    ("an empty port", |o| issuer(o, "https://auth.example.com:"), Some("spec.issuer")),
    ("the default port of https", |o| issuer(o, "https://auth.example.com:443"), Some("own port")),
    ("the default port of http", |o| issuer(o, "http://localhost:80"), Some("own port")),
    ("the default port of the other scheme", |o| issuer(o, "https://auth.example.com:80"), None),
    ("a trailing slash", |o| issuer(o, "https://auth.example.com/"), Some("spec.issuer")),
    ("an upper-case host", |o| issuer(o, "https://Auth.example.com"), Some("spec.issuer")),
    ("a path", |o| issuer(o, "https://auth.example.com/x"), Some("spec.issuer")),
    ("a query", |o| issuer(o, "https://auth.example.com?x=y"), Some("spec.issuer")),
    ("userinfo", |o| issuer(o, "https://a@auth.example.com"), Some("spec.issuer")),
    ("another scheme", |o| issuer(o, "ftp://auth.example.com"), Some("spec.issuer")),
    ("no scheme", |o| issuer(o, "auth.example.com"), Some("spec.issuer")),
    ("no host", |o| issuer(o, "https://"), Some("spec.issuer")),
    ("two dots", |o| issuer(o, "https://auth..example.com"), Some("spec.issuer")),
    ("a line break", |o| issuer(o, "https://auth.example.com\n"), Some("spec.issuer")),
    ("an issuer of 254", |o| issuer(o, &format!("https://{}", "n".repeat(246))), Some("spec.issuer")),

    ("http without allowInsecureHTTP", |o| spec(o)["connection"] = json!({}), Some("allowInsecureHTTP")),
    ("http with allowInsecureHTTP: false", |o| connection(o, "allowInsecureHTTP", json!(false)), Some("allowInsecureHTTP")),
    ("http to an external host", |o| issuer(o, "http://auth.example.com"), Some("spec.issuer: http:// is allowed only for loopback")),
    ("http to an address outside loopback", |o| issuer(o, "http://10.0.0.1"), Some("spec.issuer: http:// is allowed only for loopback")),
    ("http to a host that resembles loopback", |o| issuer(o, "http://127.0.0.1.example.com"), Some("spec.issuer: http:// is allowed only for loopback")),
    ("http to an invalid loopback address", |o| issuer(o, "http://127.0.0.256"), Some("spec.issuer: http:// is allowed only for loopback")),
    ("http to a host that resembles a Service", |o| issuer(o, "http://a.svc.example.com"), Some("spec.issuer: http:// is allowed only for loopback")),
    ("http to localhost", |o| issuer(o, "http://localhost:8080"), None),
    ("http to loopback", |o| issuer(o, "http://127.1.2.255"), None),
    ("http to a Service", |o| issuer(o, "http://zitadel.zitadel.svc:8080"), None),
    ("http to a Service by its full name", |o| issuer(o, "http://zitadel.zitadel.svc.cluster.local"), None),
    ("an endpoint", |o| connection(o, "endpoint", json!("https://zitadel.zitadel.svc:443")), None),
    ("an endpoint with a path", |o| connection(o, "endpoint", json!("https://zitadel.zitadel.svc/x")), Some("spec.connection.endpoint")),
    ("an endpoint with a port above 65535", |o| connection(o, "endpoint", json!("https://zitadel.zitadel.svc:65536")), Some("spec.connection.endpoint")),
    ("an http endpoint without allowInsecureHTTP", |o| *spec(o) = json!({"issuer": "https://auth.example.com", "connection": {"endpoint": "http://zitadel.zitadel.svc"}}), Some("spec.connection.endpoint: http:// needs")),
    ("an http endpoint with allowInsecureHTTP", |o| connection(o, "endpoint", json!("http://zitadel.zitadel.svc")), None),
    ("an http endpoint on an external host", |o| connection(o, "endpoint", json!("http://auth.example.com")), Some("spec.connection.endpoint: http:// is allowed only for loopback")),
    ("an endpoint of null", |o| connection(o, "endpoint", Value::Null), None),

    ("a timeout", |o| connection(o, "timeout", json!("1m")), None),
    ("the shortest timeout", |o| connection(o, "timeout", json!("1s")), None),
    ("a timeout of null", |o| connection(o, "timeout", Value::Null), None),
    ("too short a timeout", |o| connection(o, "timeout", json!("999ms")), Some("spec.connection.timeout")),
    ("too long a timeout", |o| connection(o, "timeout", json!("1m1s")), Some("spec.connection.timeout")),
    ("a timeout without unit", |o| connection(o, "timeout", json!("10")), Some("spec.connection.timeout")),
    ("a proxy", |o| connection(o, "proxy", json!("http://proxy.example.com:3128")), None),
    ("a proxy without scheme", |o| connection(o, "proxy", json!("proxy:3128")), Some("spec.connection.proxy")),
    ("a name for the certificate", |o| connection(o, "tlsServerName", json!("zitadel.example.com")), None),
    ("an invalid name for the certificate", |o| connection(o, "tlsServerName", json!("a b")), Some("spec.connection.tlsServerName")),
    ("a proxy and a name for the certificate", |o| {
        connection(o, "proxy", json!("https://proxy.example.com"));
        connection(o, "tlsServerName", json!("zitadel.example.com"));
    }, Some("spec.connection.tlsServerName")),
    ("a CA", |o| connection(o, "caConfigMapRef", json!({"name": "ca"})), None),
    ("an invalid CA entry", |o| connection(o, "caConfigMapRef", json!({"name": "ca", "key": "a/b"})), Some("spec.connection.caConfigMapRef.key")),
    ("an invalid CA Secret", |o| connection(o, "caSecretRef", json!({"name": "C A"})), Some("spec.connection.caSecretRef.name")),
    ("two CAs", |o| {
        connection(o, "caBundle", json!("x"));
        connection(o, "caSecretRef", json!({"name": "ca"}));
    }, Some("caBundle, caConfigMapRef and caSecretRef")),
    ("a rate of zero", |o| connection(o, "requestsPerSecond", json!(0)), Some("spec.connection.requestsPerSecond")),
    ("a rate of 1001", |o| connection(o, "requestsPerSecond", json!(1001)), Some("spec.connection.requestsPerSecond")),
    ("a burst of zero", |o| connection(o, "burst", json!(0)), Some("spec.connection.burst")),
    ("a burst of 10001", |o| connection(o, "burst", json!(10_001)), Some("spec.connection.burst")),
    ("no concurrent requests", |o| connection(o, "maxConcurrentRequests", json!(0)), Some("spec.connection.maxConcurrentRequests")),
    ("65 concurrent requests", |o| connection(o, "maxConcurrentRequests", json!(65)), Some("spec.connection.maxConcurrentRequests")),
    ("the highest limits", |o| spec(o)["connection"] = json!({"allowInsecureHTTP": true, "requestsPerSecond": 1000, "burst": 10000, "maxConcurrentRequests": 64}), None),
    ("an admin credential", |o| spec(o)["adminCredential"] = json!({"secretRef": {"name": "zitadel-admin"}}), None),
    ("an admin credential in a ledger", |o| spec(o)["adminCredential"] = json!({"secretRef": {"name": "admin-key-main"}}), Some("must not start with admin-key-")),
    ("an admin credential with rotation", |o| spec(o)["adminCredential"] = json!({"secretRef": {"name": "zitadel-admin"}, "keyRotation": {"interval": "720h"}}), None),
    ("an admin credential with a short rotation", |o| spec(o)["adminCredential"] = json!({"secretRef": {"name": "zitadel-admin"}, "keyRotation": {"interval": "59m"}}), Some("keyRotation.interval: must be at least 1h")),
    ("an admin credential in another namespace", |o| spec(o)["adminCredential"] = json!({"secretRef": {"name": "a/b"}}), Some("spec.adminCredential.secretRef.name")),
    ("a pinned id", |o| spec(o)["zitadelProjectID"] = json!("69234237810729019"), None),
    ("an invalid pinned id", |o| spec(o)["zitadelProjectID"] = json!("1 2"), Some("spec.zitadelProjectID")),
    ("a pinned id of 65", |o| spec(o)["zitadelProjectID"] = json!("1".repeat(65)), Some("spec.zitadelProjectID")),
];

#[rustfmt::skip]
const POLICIES: &[Case] = &[
    ("unchanged", |_| {}, None),
    ("no audiences", |o| drop(spec(o).as_object_mut().expect("an object").remove("audiences")), None),
    ("no selector", |o| drop(spec(o).as_object_mut().expect("an object").remove("namespaceSelector")), Some("spec.namespaceSelector")),
    ("no instance", |o| spec(o)["instanceRef"] = json!({}), Some("spec.instanceRef.name")),
    ("an invalid instance name", |o| spec(o)["instanceRef"]["name"] = json!("Main"), Some("spec.instanceRef.name")),
    ("a project twice", |o| spec(o)["audiences"]["projectIDs"] = json!(["1", "1"]), Some("spec.audiences.projectIDs")),
    ("the alias as a project", |o| spec(o)["audiences"]["projectIDs"] = json!(["zitadel"]), Some("zitadelAPI: true")),
    ("256 projects", |o| spec(o)["audiences"]["projectIDs"] = many(256), None),
    ("257 projects", |o| spec(o)["audiences"]["projectIDs"] = many(257), Some("spec.audiences.projectIDs")),
    ("a partial wildcard", |o| spec(o)["audiences"]["projectIDs"] = json!(["69*"]), Some("spec.audiences.projectIDs")),
    ("an id of 65", |o| spec(o)["audiences"]["projectIDs"] = json!(["1".repeat(65)]), Some("spec.audiences.projectIDs")),
    ("every namespace", |o| selects(o, json!({})), None),
    ("requirements", |o| selects(o, json!({"matchExpressions": [
        {"key": "a", "operator": "In", "values": ["b"]}, {"key": "a", "operator": "NotIn", "values": ["c"]},
        {"key": "a", "operator": "Exists"}, {"key": "d", "operator": "DoesNotExist", "values": []}]})), None),
    ("an unknown operator", |o| requires(o, &json!({"key": "a", "operator": "Like", "values": ["b"]})), Some("spec.namespaceSelector")),
    ("NotIn without values", |o| requires(o, &json!({"key": "a", "operator": "NotIn"})), Some("spec.namespaceSelector")),
    ("In with no values", |o| requires(o, &json!({"key": "a", "operator": "In", "values": []})), Some("spec.namespaceSelector")),
    ("Exists with values", |o| requires(o, &json!({"key": "a", "operator": "Exists", "values": ["b"]})), Some("spec.namespaceSelector")),
    ("64 values", |o| requires(o, &json!({"key": "a", "operator": "In", "values": many(64)})), None),
    ("65 values", |o| requires(o, &json!({"key": "a", "operator": "In", "values": many(65)})), Some("spec.namespaceSelector")),
    ("17 requirements", |o| selects(o, json!({"matchExpressions": vec![json!({"key": "a", "operator": "Exists"}); 17]})), Some("spec.namespaceSelector")),
    ("a value of 64", |o| selects(o, json!({"matchLabels": {"a": "v".repeat(64)}})), Some("spec.namespaceSelector")),
    ("a key of 318", |o| selects(o, json!({"matchLabels": entry(&"k".repeat(318), "v")})), Some("spec.namespaceSelector")),
    ("17 labels", |o| selects(o, json!({"matchLabels": map(17, "v")})), Some("spec.namespaceSelector")),
    ("roles at each level", |o| roles(o, json!([
        {"instance": true, "roles": ["IAM_OWNER"]}, {"organizationIDs": ["1", "2"], "roles": ["ORG_OWNER"], "allowPrivileged": true},
        {"projectIDs": ["1"], "roles": ["PROJECT_OWNER"]}, {"projectIDs": ["1"], "grantedOrganizationIDs": ["2"], "roles": ["PROJECT_GRANT_OWNER"]},
    ])), None),
    ("roles without a scope", |o| roles(o, json!([{"roles": ["ORG_OWNER"]}])), Some("spec.managerRoles[]: set exactly one of instance: true, organizationIDs and projectIDs")),
    ("roles with two scopes", |o| roles(o, json!([{"instance": true, "projectIDs": ["1"], "roles": ["IAM_OWNER"]}])), Some("set exactly one of instance: true, organizationIDs and projectIDs")),
    ("roles of no organization", |o| roles(o, json!([{"organizationIDs": [], "roles": ["ORG_OWNER"]}])), Some("spec.managerRoles[0].organizationIDs")),
    ("roles of instance false", |o| roles(o, json!([{"instance": false, "roles": ["IAM_OWNER"]}])), Some("set it to true")),
    ("a wildcard for organizations", |o| roles(o, json!([{"organizationIDs": ["*"], "roles": ["ORG_OWNER"]}])), Some("spec.managerRoles[0].organizationIDs[0]")),
    ("a wildcard for roles", |o| roles(o, json!([{"instance": true, "roles": ["IAM_*"]}])), Some("spec.managerRoles[0].roles[0]")),
    ("a role of another level", |o| roles(o, json!([{"organizationIDs": ["1"], "roles": ["IAM_OWNER"]}])), Some(".roles: roles of the instance begin with IAM_")),
    ("a grant without project", |o| roles(o, json!([{"organizationIDs": ["1"], "grantedOrganizationIDs": ["1"], "roles": ["ORG_OWNER"]}])), Some("also set projectIDs")),
];

/// Only the API server validates policies. A policy that the operator cannot decode allows nothing, and neither does a
/// value that no token can have.
#[tokio::test(flavor = "multi_thread")]
async fn crd_refuses_invalid_policies() {
    let world = World::new("policy-schema").await;
    let good = json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelAccessPolicy", "metadata": {"name": "good"},
        "spec": {"instanceRef": {"name": "main"}, "namespaceSelector": {}, "audiences": everything()},
    });
    let resource = ApiResource::erase::<ZitadelAccessPolicy>(&());
    let api = Api::all_with(Client::clone(&world.client), &resource);
    assert_cases(&api, &good, POLICIES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crd_refuses_invalid_instances() {
    let world = World::new("instance-schema").await;
    let good = json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelInstance",
        "metadata": {"name": "good"}, "spec": world.instance_spec(),
    });
    let resource = ApiResource::erase::<ZitadelInstance>(&());
    let api = Api::all_with(Client::clone(&world.client), &resource);
    assert_cases(&api, &good, INSTANCES).await;

    // Only the API server can compare an update with the stored object.
    world.instance().await;
    let refused: [Refused; 1] = [(|s| s["issuer"] = json!("https://other.example.com"), "immutable")];
    for (change, message) in refused {
        let mut spec = world.instance_spec();
        change(&mut spec);
        match world.apply_instance(spec).await {
            Err(kube::Error::Api(status)) => assert!(status.message.contains(message), "{}", status.message),
            other => panic!("{message}: {other:?}"),
        }
    }
}

/// Visits each schema of a CRD with the path to it.
fn schemas(at: &str, value: &Value, visit: &mut impl FnMut(&str, &serde_json::Map<String, Value>)) {
    match value {
        Value::Object(map) => {
            visit(at, map);
            for (key, value) in map {
                schemas(&format!("{at}.{key}"), value, visit);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| schemas(at, value, visit)),
        _ => {}
    }
}

#[test]
fn crd_schemas_are_bounded_and_have_no_spec_defaults() {
    for crd in crds() {
        let schema = serde_json::to_value(&crd.spec.versions[0].schema).expect("JSON");
        let mut wrong = Vec::new();
        schemas("", &schema, &mut |at, map| {
            let text = |key: &str| map.get(key).and_then(Value::as_str).unwrap_or_default();
            // The API server warns about formats that it does not know.
            if text("format").starts_with("uint") {
                wrong.push(format!("{at} has the format {}", text("format")));
            }
            // GitOps tools compare the applied spec with the stored one. They report a default as drift.
            let in_spec = at.contains(".properties.spec.properties.");
            if in_spec && map.contains_key("default") {
                wrong.push(format!("{at} has a default"));
            }
            // Descriptions cite no document outside the repository (see architecture.rs).
            for internal in ["§", "(K"] {
                if text("description").contains(internal) {
                    wrong.push(format!("{at} mentions {internal}"));
                }
            }
            let bounded = match text("type") {
                "array" => map.contains_key("maxItems"),
                "string" => ["maxLength", "enum"].iter().any(|bound| map.contains_key(*bound)),
                "object" if map.contains_key("additionalProperties") => map.contains_key("maxProperties"),
                _ => true,
            };
            if in_spec && !bounded {
                wrong.push(format!("{at} has no bound"));
            }
        });
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        let status = schema.pointer("/openAPIV3Schema/properties/status");
        let default = status.map(|status| &status["default"]);
        assert!(
            default.is_none_or(|default| *default == json!({"observedGeneration": -1})),
            "{default:?}"
        );
    }
}

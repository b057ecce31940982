//! Each kind of unusable key Secret has its own reason, and a message with the remedy.

use serde_json::{Value, json};
use zitadel_tokens::domain::reason::Reason;

use crate::support::world::{World, condition, one_token};

const SHORT: &str = include_str!("../support/rsa-1024.pem");

#[tokio::test(flavor = "multi_thread")]
async fn each_wrong_key_secret_has_its_own_reason() {
    let world = World::new("keys").await;
    let _operator = world.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    let good = &user.key;
    let file = |change: fn(&mut Value)| {
        let mut file = serde_json::from_str(good).expect("JSON");
        change(&mut file);
        file.to_string()
    };
    let application =
        json!({"type": "application", "keyId": "1", "key": "x", "appId": "2", "clientId": "3"}).to_string();
    let ends = json!({"expirationDate": "2020-01-01T00:00:00Z"});
    let (_, expired) = world.issuer.key(&user.id, ends).await;
    let (removed_id, removed) = world.issuer.key(&user.id, json!({})).await;
    world.issuer.remove_key(&user.id, &removed_id).await;

    // Name, data of the Secret, `spec.keySecretRef.key`, and the reason. Without a reason, the key is usable.
    #[rustfmt::skip]
    let cases: Vec<(&str, Value, Option<&str>, Option<Reason>)> = vec![
        ("any-name", json!({"billing": good}), None, None),
        ("one-of-two", json!({"a": "x", "b": good}), Some("b"), None),
        ("old-file", json!({"k": file(|f| { f.as_object_mut().expect("an object").retain(|k, _| k != "type" && k != "expirationDate"); })}), None, None),
        ("missing", Value::Null, None, Some(Reason::KeySecretMissing)),
        ("no-entry", json!({}), None, Some(Reason::KeyEntryMissing)),
        ("other-entry", json!({"a": good}), Some("b"), Some(Reason::KeyEntryMissing)),
        ("two-entries", json!({"a": good, "b": good}), None, Some(Reason::KeyEntryAmbiguous)),
        ("large", json!({"k": "x".repeat((1 << 20) - 1_000)}), None, Some(Reason::KeyTooLarge)),
        ("empty", json!({"k": ""}), None, Some(Reason::KeyNotJSON)),
        ("cut-off", json!({"k": good[..good.len() / 2]}), None, Some(Reason::KeyNotJSON)),
        ("no-user", json!({"k": file(|f| drop(f.as_object_mut().expect("an object").remove("userId")))}), None, Some(Reason::KeyFieldInvalid)),
        ("wrong-field", json!({"k": file(|f| f["keyId"] = json!(7))}), None, Some(Reason::KeyFieldInvalid)),
        ("robot", json!({"k": file(|f| f["type"] = json!("robot"))}), None, Some(Reason::KeyTypeUnknown)),
        ("application", json!({"k": application}), None, Some(Reason::KeyIsApplicationKey)),
        ("no-pem", json!({"k": file(|f| f["key"] = json!("x"))}), None, Some(Reason::KeyPEMInvalid)),
        ("short", json!({"k": file(|f| f["key"] = json!(SHORT))}), None, Some(Reason::KeyTooShort)),
        ("expired", json!({"k": expired}), None, Some(Reason::KeyExpired)),
        ("removed", json!({"k": removed}), None, Some(Reason::KeyRejected)),
    ];
    for (name, data, entry, _) in &cases {
        if !data.is_null() {
            world.secret(&format!("{name}-key"), data.clone()).await;
        }
        let mut spec = one_token(&format!("{name}-token"));
        spec["keySecretRef"] = json!({"name": format!("{name}-key")});
        if let Some(entry) = entry {
            spec["keySecretRef"]["key"] = json!(entry);
        }
        world.service_user(name, spec).await.expect("accepted");
    }
    for (name, _, _, reason) in &cases {
        let Some(reason) = reason else {
            world.ready(name, "True", "Issued").await;
            continue;
        };
        let object = world.ready(name, "False", reason.name()).await;
        for kind in ["Ready", "KeyValid"] {
            let (status, actual, message) = condition(&object, kind).expect(kind);
            assert_eq!((status, actual), ("False", reason.name()), "{name} {kind}");
            assert!(message.contains(reason.remedy()), "{name} {kind}: {message}");
        }
    }

    // The Secret is created or fixed after the object, as in many pipelines.
    for name in ["missing", "cut-off", "short"] {
        world.secret(&format!("{name}-key"), json!({"k": good})).await;
        world.ready(name, "True", "Issued").await;
    }

    // The operator does not read a token Secret of another service user as a key, whatever its content.
    let mut spec = one_token("borrowed-token");
    spec["keySecretRef"] = json!({"name": "any-name-token", "key": "token"});
    world.service_user("borrowed", spec).await.expect("accepted");
    let object = world.ready("borrowed", "False", "KeyIsTokenSecret").await;
    let (_, _, message) = condition(&object, "Ready").expect("Ready");
    assert!(message.contains(Reason::KeyIsTokenSecret.remedy()), "{message}");
}

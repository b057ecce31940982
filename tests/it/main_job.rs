//! The main job: one service user's token in a Secret, kept fresh.

use serde_json::json;

use crate::support::world::{PROJECT, World, claims, condition};

#[tokio::test(flavor = "multi_thread")]
async fn a_token_with_the_right_audience_is_in_the_secret() {
    let world = World::new("main-job").await;
    let _operator = world.operator().await;
    world.instance().await;
    let user = world.simple("billing", json!({"tokenType": "JWT"})).await;

    let data = world.secret_until("billing-token", |d| d.contains_key("token")).await;
    let claims = claims(&data["token"]);
    assert_eq!(claims["aud"], json!([PROJECT]));
    assert_eq!(claims["sub"], json!(user.id));
    assert_eq!(claims["iss"], json!(world.issuer.issuer));
    assert_eq!(data["token_type"], "Bearer");
    assert_eq!(data["issuer"], world.issuer.issuer);

    let object = world.ready("billing", "True", "Issued").await;
    let status = object.status.clone().expect("a status");
    assert_eq!(status.user_id.as_deref(), Some(&*user.id));
    assert_eq!(status.key_id.as_deref(), Some(&*user.key_id));
    assert_eq!(status.tokens_ready.as_deref(), Some("1/1"));
    assert_eq!(data["expires_at"], status.expires_at.expect("an expiry").0.to_string());
    assert_eq!(condition(&object, "Stalled"), None);
    assert_eq!(condition(&object, "Reconciling"), None);
    assert_eq!(world.issuer.mints().await, 1);
}

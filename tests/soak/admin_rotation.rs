//! Rotation of an administrator's key: a crash at each step, also while the rotation ends.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use serde_json::json;

use crate::managed_users::{behind_proxy, kill};
use crate::places::{Place, stop_at};
use crate::reduced;
use crate::support::eventually_within;
use crate::support::managed::Managed;
use crate::support::proxy::Proxy;

/// A key that ZITADEL may have gets half a minute to show.
const RECOVERED: Duration = Duration::from_secs(100);

const LEDGER: &str = "/secrets/admin-key-";

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_step_leaves_the_administrator_a_key_that_works_and_no_other() {
    let (mut managed, proxy) = behind_proxy("adminsteps").await;
    let rotation = json!({"interval": "1h", "overlap": "10s"});
    managed.rotates(rotation.clone()).await;
    managed.key_rotated("True", "KeyRotationOnSchedule").await;
    let (user_id, bootstrap) = (managed.admin.id.clone(), managed.admin.key_id.clone());
    let keys_path: &'static str = format!("/v2/users/{user_id}/keys").leak();

    let places = [
        Place::Zitadel(keys_path, true),
        Place::Kubernetes("PUT", LEDGER, 3, true),
        Place::Kubernetes("PUT", LEDGER, 1, false),
        Place::Kubernetes("PUT", LEDGER, 1, true),
        Place::Zitadel(keys_path, false),
        Place::Kubernetes("PUT", LEDGER, 2, false),
        Place::Kubernetes("PUT", LEDGER, 2, true),
        Place::Kubernetes("PUT", LEDGER, 3, false),
        Place::Kubernetes("PUT", LEDGER, 4, false),
        Place::Kubernetes("PUT", LEDGER, 4, true),
    ];
    for (n, place) in places.iter().take(if reduced() { 2 } else { places.len() }).enumerate() {
        let (started, request) = (Instant::now(), n.to_string());
        killed_at(&mut managed, &proxy, *place, async |managed| {
            managed.request_rotation(&request).await;
        })
        .await;
        let current = managed.rotation_served(&request, RECOVERED).await;
        has_keys(&managed, &[&bootstrap, &current]).await;
        println!("{place:?}: one new key after {:.1} s", started.elapsed().as_secs_f64());
    }

    let places = [
        (Place::Kubernetes("DELETE", LEDGER, 1, false), false),
        // At the removal of the key.
        (Place::Zitadel("", true), true),
        (Place::Zitadel("", false), true),
        (Place::Kubernetes("PUT", LEDGER, 1, false), false),
        (Place::Kubernetes("PUT", LEDGER, 1, true), false),
        (Place::Kubernetes("DELETE", LEDGER, 1, true), false),
    ];
    for (n, (place, at_key)) in places.into_iter().take(if reduced() { 1 } else { 6 }).enumerate() {
        let started = Instant::now();
        managed.rotates(rotation.clone()).await;
        let own = managed.key_rotated("True", "KeyRotationOnSchedule").await.key_id;
        let own = own.expect("a key id");
        has_keys(&managed, &[&bootstrap, &own]).await;
        let place = match place {
            Place::Zitadel(_, after) if at_key => Place::Zitadel(format!("{keys_path}/{own}").leak(), after),
            place => place,
        };
        killed_at(&mut managed, &proxy, place, async |managed| managed.instance().await).await;
        // The administrator works at once.
        let name = format!("user-{n}");
        managed.user(&name, json!({})).await;
        managed.world.ready(&name, "True", "Issued").await;
        has_keys(&managed, &[&bootstrap]).await;
        let secrets: Api<Secret> = Api::namespaced(managed.world.client.clone(), &managed.world.home());
        let ledger = format!("admin-key-{}", managed.world.instance);
        eventually_within("no ledger", RECOVERED, async || {
            secrets.get_opt(&ledger).await.expect("readable").is_none()
        })
        .await;
        println!("{place:?}: back after {:.1} s", started.elapsed().as_secs_f64());
    }
}

/// Does what begins a sequence, and kills the operator at a place of it. Starts another one.
async fn killed_at(managed: &mut Managed, proxy: &Proxy, place: Place, begin: impl AsyncFnOnce(&Managed)) {
    let issuer = managed.world.issuer.clone();
    let hold = stop_at(&issuer, proxy, place, async || begin(managed).await).await;
    kill(managed, proxy, hold).await;
}

/// Waits until ZITADEL has exactly these keys of the administrator.
async fn has_keys(managed: &Managed, wanted: &[&str]) {
    let mut wanted: Vec<&str> = wanted.to_vec();
    wanted.sort_unstable();
    eventually_within("the keys", RECOVERED, async || {
        let keys = managed.world.issuer.keys(&managed.admin.id).await;
        let mut keys: Vec<&str> = keys.iter().map(|key| &*key.id).collect();
        keys.sort_unstable();
        keys == wanted
    })
    .await;
}

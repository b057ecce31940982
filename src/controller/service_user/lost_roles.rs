//! Finds role ledgers whose objects vanished, or lost their finalizer, while no operator ran. A tenant could otherwise keep
//! the roles (`docs/adr/0022-manager-roles-are-granted-by-a-ledger.md`).

use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::api::ListParams;
use kube::{Api, ResourceExt};

use crate::api::metadata::LABEL_ROLE_LEDGER;
use crate::controller::Context;
use crate::controller::service_user::gather;
use crate::domain::object_ref::ObjectRef;
use crate::domain::role_ledger::RoleLedger;
use crate::domain::summary::UserSummary;

/// How long to wait after a failure.
const RETRY: Duration = Duration::from_mins(1);

/// Remembers which objects have a ledger. Reads the ledgers of objects that do not show that they have roles, and wakes these
/// objects. Their reconcile revokes the roles.
pub async fn find(ctx: &Context) {
    let Some(namespace) = &ctx.operator_namespace else {
        return;
    };
    let api: Api<Secret> = Api::namespaced(ctx.client.clone(), namespace);
    let params = ListParams::default().labels(LABEL_ROLE_LEDGER);
    let listed = loop {
        match api.list_metadata(&params).await {
            Ok(listed) => break listed,
            Err(kube::Error::Api(status)) if status.code == 403 => {
                tracing::warn!(
                    namespace,
                    "the operator may not list its ledgers: it cannot find roles of lost objects"
                );
                return;
            }
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    };
    let mut unread = listed.items;
    while !unread.is_empty() {
        let known = ctx.cache.holders_of_roles();
        let mut failed = Vec::new();
        for secret in unread {
            let uid = secret.labels().get(LABEL_ROLE_LEDGER).cloned().unwrap_or_default();
            if secret.name_any() != gather::role_ledger_name(&uid) {
                continue;
            }
            if let Some(id) = known.get(&*uid) {
                // It may lose its finalizer, and be deleted, before its first reconcile, or since `known`.
                ctx.memory.note_roles(id, &uid, true);
                let holds = |user: &UserSummary| *user.uid == *uid && user.holds.roles;
                if !ctx.cache.user(id).is_some_and(|user| holds(&user)) {
                    ctx.users.changed(id, None);
                }
                continue;
            }
            match ctx.reader.role_ledger(namespace, &secret.name_any()).await {
                Ok(Ok(Some(stored))) => wake(ctx, &uid, &stored.ledger),
                Ok(Ok(None)) => {}
                Ok(Err(_)) => tracing::warn!(secret = secret.name_any(), "a role ledger is invalid"),
                Err(_) => failed.push(secret),
            }
        }
        unread = failed;
        if !unread.is_empty() {
            tokio::time::sleep(RETRY).await;
        }
    }
}

fn wake(ctx: &Context, uid: &str, ledger: &RoleLedger) {
    // Another operator may keep its ledgers in the same namespace.
    let is_ours = |id: &ObjectRef| ctx.watches(&id.namespace) && ctx.serves(&ledger.instance);
    if let Some(id) = ledger.object_ref().filter(is_ours) {
        tracing::info!(object = %id, "the object has manager roles and does not show it");
        ctx.memory.note_roles(&id, uid, true);
        ctx.users.changed(&id, None);
    }
}

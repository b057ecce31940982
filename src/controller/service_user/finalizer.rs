//! The operator's finalizers of a service user.

use std::sync::Arc;

use kube::ResourceExt;

use crate::api::ZitadelServiceUser;
use crate::controller::Context;
use crate::controller::write::WriteError;

/// Whether the object has this finalizer.
pub fn is_set(user: &ZitadelServiceUser, ours: &str) -> bool {
    user.finalizers().iter().any(|finalizer| finalizer == ours)
}

/// Adds or removes a finalizer, unless that is done already. Updates `user`, and returns the resource version of a write.
pub(super) async fn set(
    ctx: &Context,
    user: &mut Arc<ZitadelServiceUser>,
    ours: &str,
    present: bool,
) -> Result<Option<String>, WriteError> {
    if is_set(user, ours) == present {
        return Ok(None);
    }
    let version = ctx.writer.set_finalizer(user, ours, present).await?;
    let metadata = &mut Arc::make_mut(user).metadata;
    let finalizers = metadata.finalizers.get_or_insert_default();
    finalizers.retain(|other| other != ours);
    if present {
        finalizers.push(ours.to_owned());
    }
    metadata.resource_version = Some(version.clone());
    Ok(Some(version))
}

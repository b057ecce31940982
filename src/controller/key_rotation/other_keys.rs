//! Which keys other objects use. The operator asks before it removes a bootstrap key, and when it counts foreign credentials.
//! Keys that no reconcile has read, for example because no policy allows their object a token, are read now.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::controller::instance::credential;
use crate::controller::key_rotation::{Holder, Rotation};
use crate::controller::ledger;
use crate::controller::read::{ReadError, ReadUser};
use crate::controller::service_user::key_ledger_name;
use crate::domain::key_ledger::BootstrapKey;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::summary::UserSummary;
use crate::domain::validate;

/// Most Secrets that are read for one answer. What was read is remembered, so that the next attempt continues there.
const MOST_READ: usize = 256;

impl<H: Holder> Rotation<'_, H> {
    /// Whether another object uses the bootstrap key. `None` if this needs more reads: the next attempt continues.
    pub(super) async fn is_used_by_others(&self, bootstrap: &BootstrapKey) -> Option<bool> {
        if self.is_used_by_administrator(bootstrap).await? {
            return Some(true);
        }
        let memory = &self.ctx.keys;
        // Many objects can name one Secret, so that one change makes all of them unread.
        let mut unread: BTreeMap<(Arc<str>, Box<str>), Vec<ObjectRef>> = BTreeMap::new();
        for (other, user) in self.others() {
            if user.deleting {
                continue;
            }
            match memory.uses_bootstrap(&other, bootstrap) {
                Some(true) => return Some(true),
                Some(false) => {}
                None => {
                    let secret = (other.namespace.clone(), user.key_secret.clone());
                    unread.entry(secret).or_default().push(other);
                }
            }
        }
        let mut reads = MOST_READ;
        for ((namespace, secret), objects) in unread {
            reads = reads.checked_sub(1)?;
            let keys = self.bootstrap_keys_in(&namespace, &secret).await.ok()?;
            for object in objects {
                let keys = if let Some(keys) = &keys {
                    keys.clone()
                } else {
                    reads = reads.checked_sub(1)?;
                    self.bootstrap_key_of(&object).await.ok()?
                };
                memory.learn_bootstrap(&object, &keys);
                if keys.iter().any(|key| key.is(bootstrap)) {
                    return Some(true);
                }
            }
        }
        Some(false)
    }

    /// Whether the administrator of another instance uses the bootstrap key. An instance or credential that cannot be read
    /// counts as a use: what is in it now may be the key that someone is about to bind.
    async fn is_used_by_administrator(&self, bootstrap: &BootstrapKey) -> Option<bool> {
        for other in self.other_instances() {
            let read = match self.ctx.cache.instance(&other.name) {
                Ok(instance) if instance.spec.admin_credential.is_none() => continue,
                Ok(instance) => credential::read(self.ctx, &instance).await,
                Err(reason) => Err(reason),
            };
            match read {
                Err(Reason::APIServerUnavailable) => return None,
                Err(reason) => {
                    let (object, instance) = (self.id, &other.name);
                    tracing::warn!(%object, %instance, %reason, "the bootstrap key stays: the admin credential of this instance cannot be read");
                    return Some(true);
                }
                Ok(_) if self.ctx.keys.uses_bootstrap(&other, bootstrap) == Some(true) => return Some(true),
                Ok(_) => {}
            }
        }
        Some(false)
    }

    fn other_instances(&self) -> impl Iterator<Item = ObjectRef> {
        let all = self.ctx.cache.instances().into_iter();
        all.filter(|other| other != self.id)
    }

    /// Whether the operator knows which keys it made for other objects. Otherwise these keys would look foreign.
    pub(super) async fn knows_keys_of_others(&self) -> bool {
        let Ok(namespace) = ledger::namespace(self.ctx) else {
            return false;
        };
        let memory = &self.ctx.keys;
        for other in self.other_instances().filter(|other| !memory.knows_made(other)) {
            let Ok(instance) = self.ctx.cache.instance(&other.name) else {
                continue;
            };
            let read = credential::read(self.ctx, &instance).await;
            if read.err() == Some(Reason::APIServerUnavailable) {
                return false;
            }
        }
        let unread = self
            .others()
            .filter(|(other, user)| user.holds.keys && !memory.knows_made(other));
        let unread: Vec<_> = unread.take(MOST_READ + 1).collect();
        for (other, user) in unread.iter().take(MOST_READ) {
            let name = key_ledger_name(&user.uid);
            match self.ctx.reader.key_ledger(namespace, &name).await {
                Ok(Ok(Some(stored))) => memory.learn_made(other, stored.ledger.made_key_ids()),
                // Nobody knows what a damaged ledger named.
                Ok(_) => memory.learn_made(other, std::iter::empty()),
                Err(_) => return false,
            }
        }
        unread.len() <= MOST_READ
    }

    /// The other objects that this operator serves.
    fn others(&self) -> impl Iterator<Item = (ObjectRef, Arc<UserSummary>)> {
        let all = self.ctx.cache.all_users().into_iter();
        // Another operator serves the other instances.
        all.filter(|(other, user)| other != self.id && self.ctx.serves(&user.instance))
    }

    /// The keys in a Secret, whichever of its entries an object names: none if the operator may not read it. `None` if it has
    /// too many entries.
    async fn bootstrap_keys_in(&self, namespace: &str, secret: &str) -> Result<Option<Vec<BootstrapKey>>, ReadError> {
        // With an invalid name there is no key.
        if !validate::is_name(secret) {
            return Ok(Some(Vec::new()));
        }
        match self.ctx.reader.keys_in(namespace, secret).await {
            Ok(keys) => Ok(keys.map(|keys| keys.iter().map(BootstrapKey::of).collect())),
            Err(ReadError::Forbidden) => Ok(Some(Vec::new())),
            Err(error) => Err(error),
        }
    }

    /// The key in the entry that the object names.
    async fn bootstrap_key_of(&self, object: &ObjectRef) -> Result<Vec<BootstrapKey>, ReadError> {
        let Some(ReadUser::Readable(user)) = self.ctx.reader.user(object).await? else {
            return Ok(Vec::new());
        };
        let Some(reference) = &user.spec.key_secret_ref else {
            return Ok(Vec::new());
        };
        let key = self.ctx.reader.key(&object.namespace, reference).await?;
        Ok(key.iter().map(BootstrapKey::of).collect())
    }
}

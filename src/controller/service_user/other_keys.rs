//! Which keys other objects use. The operator asks before it removes a bootstrap key, and when it counts foreign credentials.
//! Keys that no reconcile has read, for example because no policy allows their object a token, are read now.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::controller::service_user::gather;
use crate::controller::service_user::rotate::Rotation;
use crate::domain::key_ledger::BootstrapKey;
use crate::domain::object_ref::ObjectRef;
use crate::domain::summary::UserSummary;
use crate::domain::validate;

/// Most Secrets that are read for one answer. What was read is remembered, so that the next attempt continues there.
const MOST_READ: usize = 256;

impl Rotation<'_> {
    /// Whether another object uses the bootstrap key. `None` if this needs more reads: the next attempt continues.
    pub(super) async fn is_used_by_others(&self, bootstrap: &BootstrapKey) -> Option<bool> {
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
        for ((namespace, secret), objects) in unread.iter().take(MOST_READ) {
            let keys = self.bootstrap_keys_in(namespace, secret).await?;
            let is_used = keys.iter().any(|key| key.is(bootstrap));
            for object in objects {
                memory.learn_bootstrap(object, &keys);
            }
            if is_used {
                return Some(true);
            }
        }
        (unread.len() <= MOST_READ).then_some(false)
    }

    /// Whether the operator knows which keys it made for other objects. Otherwise these keys would look foreign.
    pub(super) async fn knows_keys_of_others(&self) -> bool {
        let Ok(namespace) = self.namespace() else { return false };
        let memory = &self.ctx.keys;
        let unread = self
            .others()
            .filter(|(other, user)| user.holds.keys && !memory.knows_made(other));
        let unread: Vec<_> = unread.take(MOST_READ + 1).collect();
        for (other, user) in unread.iter().take(MOST_READ) {
            let name = gather::key_ledger_name(&user.uid);
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

    /// The keys in a Secret, whichever of its entries an object names. `None` if they cannot be read.
    async fn bootstrap_keys_in(&self, namespace: &str, secret: &str) -> Option<Vec<BootstrapKey>> {
        // With an invalid name there is no key.
        if !validate::is_name(secret) {
            return Some(Vec::new());
        }
        let keys = self.ctx.reader.keys_in(namespace, secret).await.ok()?;
        Some(keys.iter().map(BootstrapKey::of).collect())
    }
}

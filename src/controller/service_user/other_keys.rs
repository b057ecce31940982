//! Which keys other objects use. The operator asks before it removes a bootstrap key, and when it counts foreign credentials.
//! Keys that no reconcile has read, for example because no policy allows their object a token, are read now.

use std::sync::Arc;

use crate::controller::read::ReadUser;
use crate::controller::service_user::gather;
use crate::controller::service_user::rotate::Rotation;
use crate::domain::key_ledger::BootstrapKey;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Subject;
use crate::domain::summary::UserSummary;
use crate::domain::validate;

/// Most objects that are read for one answer. What was read is remembered, so that the next attempt continues there.
const MOST_READ: usize = 256;

impl Rotation<'_> {
    /// Whether another object uses the bootstrap key, or may use it.
    pub(super) async fn is_used_by_others(&self, bootstrap: &BootstrapKey) -> bool {
        let memory = &self.ctx.keys;
        let mut unread = Vec::new();
        for (other, user) in self.others() {
            if user.deleting {
                continue;
            }
            match memory.uses_bootstrap(&other, bootstrap) {
                Some(true) => return true,
                Some(false) => {}
                None => unread.push(other),
            }
        }
        for other in unread.iter().take(MOST_READ) {
            if !self.read_bootstrap(other).await || memory.uses_bootstrap(other, bootstrap) == Some(true) {
                return true;
            }
        }
        unread.len() > MOST_READ
    }

    /// Whether the operator knows which keys it made for other objects. Otherwise these keys would look foreign.
    pub(super) async fn knows_keys_of_others(&self) -> bool {
        let Ok(namespace) = self.namespace() else { return false };
        let memory = &self.ctx.keys;
        let unread = self
            .others()
            .filter(|(other, user)| user.holds_keys && !memory.knows_made(other));
        let unread: Vec<_> = unread.take(MOST_READ + 1).collect();
        for (other, user) in unread.iter().take(MOST_READ) {
            let name = gather::ledger_name(&user.uid);
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

    /// Reads the bootstrap key of an object. Returns whether it could be read.
    async fn read_bootstrap(&self, other: &ObjectRef) -> bool {
        let keys = match self.ctx.reader.user(other).await {
            Ok(Some(ReadUser::Readable(user))) if validate::key_secret(&user.spec).is_ok() => {
                let key = self.ctx.reader.key(&other.namespace, &user.spec.key_secret_ref).await;
                match key {
                    Ok(Ok(key)) => Some(BootstrapKey::of(&key)),
                    Ok(Err(reason)) if reason.subject() == Subject::Key => None,
                    _ => return false,
                }
            }
            // Without a readable object, or with an invalid name, there is no key.
            Ok(_) => None,
            Err(_) => return false,
        };
        self.ctx.keys.learn_bootstrap(other, keys);
        true
    }
}

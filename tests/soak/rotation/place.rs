//! Places where an external call of a rotation stops the operator: a call to the API server is held by the proxy, a call
//! to ZITADEL is never answered.

use std::sync::Arc;

use serde_json::json;

use crate::rotation::subject::{API, Subject, TOKEN, key_id, within};
use crate::support::issuer::Recorded;
use crate::support::proxy::{Hold, Proxy};
use crate::support::world::World;

/// An external call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    GetLedger,
    CreateLedger,
    ReplaceLedger,
    DeleteLedger,
    PatchFinalizer,
    PutStatus,
    /// The request for a token for the ZITADEL API.
    RequestToken,
    ListKeys,
    AddKey,
    RemoveBootstrapKey,
    RemoveCurrentKey,
    RemovePreviousKey,
    CountPersonalTokens,
}

/// Whether the other side handles the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The call never takes effect.
    Before,
    /// The call takes effect, and its answer never arrives.
    After,
}

/// The n-th such call from now on.
#[derive(Clone, Copy, Debug)]
pub struct Place(pub Call, pub usize, pub Side);

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(call, nth, side) = self;
        write!(f, "{side:?} {call:?} #{nth}")
    }
}

/// A place that waits for its call.
pub enum Trap<'a> {
    Kubernetes {
        proxy: &'a Proxy,
        hold: Arc<Hold>,
        place: Place,
        method: &'static str,
        piece: String,
    },
    Zitadel {
        world: &'a World,
        place: Place,
        path: String,
        user: String,
        /// The number of such calls before.
        before: usize,
        keys: usize,
    },
}

impl Call {
    /// Method and piece of the path of a call to the API server.
    fn to_kubernetes(self, world: &World, subject: &Subject) -> Option<(&'static str, String)> {
        let ledger = format!("/secrets/service-user-key-{}", subject.uid());
        let object = format!("/zitadelserviceusers/{}", subject.name);
        Some(match self {
            Self::GetLedger => ("GET", ledger),
            Self::CreateLedger => ("POST", format!("/namespaces/{}/secrets?", world.home())),
            Self::ReplaceLedger => ("PUT", ledger),
            Self::DeleteLedger => ("DELETE", ledger),
            Self::PatchFinalizer => ("PATCH", format!("{object}?")),
            Self::PutStatus => ("PUT", format!("{object}/status")),
            _ => return None,
        })
    }

    /// Path of a call to ZITADEL.
    async fn to_zitadel(self, world: &World, subject: &Subject) -> String {
        let keys = format!("/v2/users/{}/keys", subject.user.id);
        let current = key_id(&subject.object).unwrap_or_default();
        match self {
            Self::RequestToken => TOKEN.to_owned(),
            Self::ListKeys => "/v2/users/keys/search".to_owned(),
            Self::RemoveBootstrapKey => format!("{keys}/{}", subject.user.key_id),
            Self::RemoveCurrentKey => format!("{keys}/{current}"),
            Self::RemovePreviousKey => {
                let others = [&subject.user.key_id, &subject.foreign, &current];
                let all = subject.keys(world).await.into_iter();
                let previous: Vec<String> = all.filter(|key| !others.contains(&key)).collect();
                assert_eq!(previous.len(), 1, "one previous key: {previous:?}");
                format!("{keys}/{}", previous[0])
            }
            Self::CountPersonalTokens => "/v2/users/pats/search".to_owned(),
            _ => keys,
        }
    }
}

impl<'a> Trap<'a> {
    /// Has the operator stop at this place, from now on.
    pub async fn set(world: &'a World, proxy: &'a Proxy, subject: &Subject, place: Place) -> Self {
        let Place(call, nth, side) = place;
        if let Some((method, piece)) = call.to_kubernetes(world, subject) {
            let hold = match side {
                Side::After if nth == 1 => proxy.hold_after(method, &piece),
                _ => proxy.hold_before(method, &piece),
            };
            return Self::Kubernetes {
                proxy,
                hold,
                place,
                method,
                piece,
            };
        }
        let path = call.to_zitadel(world, subject).await;
        let user = subject.user.id.clone();
        let before = calls(world, &path, &user).await.len();
        let keys = subject.keys(world).await.len();
        let scope = if call == Call::RequestToken { API } else { "" };
        if nth > 1 {
            // These calls pass. A fault counts them.
            let pass =
                json!({"path": path, "userId": user, "scopeContains": scope, "times": nth - 1, "latencyMillis": 1});
            world.issuer.fault(pass).await;
        }
        let hang = json!({"path": path, "userId": user, "scopeContains": scope, "times": 1, "hang": true, "afterHandling": side == Side::After});
        world.issuer.fault(hang).await;
        Self::Zitadel {
            world,
            place,
            path,
            user,
            before,
            keys,
        }
    }

    /// Waits until the operator has made the call and does not get its answer. Returns the hold of a call to the API
    /// server.
    pub async fn reached(self) -> Option<Arc<Hold>> {
        match self {
            Self::Kubernetes {
                proxy,
                mut hold,
                place: Place(_, nth, side),
                method,
                piece,
            } => {
                for n in 2..=nth {
                    hold.reached().await;
                    let next = match side {
                        Side::After if n == nth => proxy.hold_after(method, &piece),
                        _ => proxy.hold_before(method, &piece),
                    };
                    hold.release();
                    hold = next;
                }
                hold.reached().await;
                Some(hold)
            }
            Self::Zitadel {
                world,
                place: Place(call, nth, side),
                path,
                user,
                before,
                keys,
            } => {
                within("the call to ZITADEL", async || {
                    calls(world, &path, &user).await.len() >= before + nth
                })
                .await;
                let took_effect = async || match call {
                    Call::RequestToken => !calls(world, &path, &user).await[before + nth - 1]
                        .access_token
                        .is_empty(),
                    Call::AddKey => world.issuer.keys(&user).await.len() == keys + nth,
                    Call::RemoveBootstrapKey | Call::RemoveCurrentKey | Call::RemovePreviousKey => {
                        let keys = world.issuer.keys(&user).await;
                        keys.iter().all(|key| !path.ends_with(&key.id))
                    }
                    // The others change nothing.
                    _ => true,
                };
                if side == Side::After {
                    within("the call has taken effect", took_effect).await;
                }
                None
            }
        }
    }
}

/// The operator's own calls to this path for this user.
async fn calls(world: &World, path: &str, user: &str) -> Vec<Recorded> {
    let mut all = world.issuer.requests().await;
    all.retain(|r| r.path == path && r.user_id == user && (path != TOKEN || r.scopes == [API]));
    all
}

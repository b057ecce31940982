//! The role ledger: which manager roles the operator has granted to the user of one object. It is the content of a Secret
//! in the operator's namespace, and all that revoking them needs
//! (`docs/adr/0022-manager-roles-are-granted-by-a-ledger.md`).

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretSlice};
use serde::{Deserialize, Serialize};

use crate::domain::key;
use crate::domain::key_rotation::lags_until;
use crate::domain::manager_role::{RoleScope, WantedRoles};
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::stored::Stored;
use crate::domain::time::shifted;
use crate::domain::validate::is_name;

/// The version that the operator writes.
const VERSION: u32 = 1;

/// Entry of the Secret.
const LEDGER: &str = "ledger.json";

/// Most scopes of a ledger. A spec has at most 16, and the rest are to be revoked.
const MOST_SCOPES: usize = 64;

/// The roles are compared with ZITADEL this long after the last time.
const CHECKED_EVERY: SignedDuration = SignedDuration::from_hours(6);

/// The manager roles that the operator granted for one object. All times are by the server's clock.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RoleLedger {
    /// Version of this format.
    v: u32,
    /// Cluster (if it has a name), namespace and name of the object, for people who read the Secret.
    pub object: String,
    /// Name of the instance.
    pub instance: String,
    /// Its issuer.
    pub issuer: String,
    /// The ZITADEL user that has the roles.
    pub user_id: String,
    /// The roles, by scope.
    pub scopes: Vec<GrantedRoles>,
    /// A hash of what ZITADEL was last seen to have.
    #[serde(default)]
    pub applied: Option<String>,
    /// When that was.
    #[serde(default)]
    pub checked: Option<Timestamp>,
    /// The renew request at that time.
    #[serde(default)]
    pub request: Option<String>,
}

/// The roles in one scope.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct GrantedRoles {
    /// What the roles are for.
    pub scope: RoleScope,
    /// The roles that the operator granted, or is about to grant.
    pub roles: BTreeSet<String>,
    /// What a request was to change the user's roles to, until ZITADEL shows it.
    #[serde(default)]
    pub expected: Option<ExpectedRoles>,
}

/// The roles that a user has after a change.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ExpectedRoles {
    /// All roles, those that others granted included.
    pub roles: BTreeSet<String>,
    /// When the change was requested.
    pub since: Timestamp,
}

/// A role ledger in its Secret.
pub type StoredRoles = Stored<RoleLedger>;

impl RoleLedger {
    /// A ledger without roles.
    #[must_use]
    pub fn new(object: String, instance: &str, issuer: &str, user_id: &str) -> Self {
        Self {
            v: VERSION,
            object,
            instance: instance.to_owned(),
            issuer: issuer.to_owned(),
            user_id: user_id.to_owned(),
            scopes: Vec::new(),
            applied: None,
            checked: None,
            request: None,
        }
    }

    /// The object.
    #[must_use]
    pub fn object_ref(&self) -> Option<ObjectRef> {
        let mut parts = self.object.rsplit('/');
        let (name, namespace) = (parts.next()?, parts.next()?);
        (is_name(name) && is_name(namespace)).then(|| ObjectRef::new(namespace, name))
    }

    /// Whether the Secret of a ledger has an entry with this name.
    #[must_use]
    pub fn has_entry(name: &str) -> bool {
        name == LEDGER
    }

    /// Reads a ledger from the data of its Secret.
    pub fn parse(data: &BTreeMap<String, SecretSlice<u8>>) -> Result<Self, Reason> {
        let text = data.get(LEDGER).ok_or(Reason::RoleLedgerInvalid)?;
        let ledger: Self = serde_json::from_slice(text.expose_secret()).map_err(|_| Reason::RoleLedgerInvalid)?;
        let distinct: BTreeSet<&RoleScope> = ledger.scopes.iter().map(|granted| &granted.scope).collect();
        let is_valid = ledger.v == VERSION
            && key::is_plain_id(&ledger.user_id)
            && ledger.scopes.len() <= MOST_SCOPES
            && distinct.len() == ledger.scopes.len();
        is_valid.then_some(ledger).ok_or(Reason::RoleLedgerInvalid)
    }

    /// The data of its Secret.
    #[must_use]
    pub fn data(&self) -> BTreeMap<&'static str, SecretSlice<u8>> {
        // A struct of strings, numbers and times always serializes.
        let text = serde_json::to_vec(self).unwrap_or_default();
        BTreeMap::from([(LEDGER, text.into())])
    }

    /// Whether the roles were granted to this user of this issuer.
    #[must_use]
    pub fn is_of(&self, issuer: &str, user_id: &str) -> bool {
        self.issuer == issuer && self.user_id == user_id
    }

    /// Whether ZITADEL has to be asked: something changed, a change is not confirmed, or nobody compared for long. Only a
    /// reconcile that has another cause compares, so an idle object costs nothing.
    #[must_use]
    pub fn is_due(&self, hash: &str, request: Option<&str>, now: Timestamp) -> bool {
        let is_recent = |at: Timestamp| shifted(at, CHECKED_EVERY) > now && at <= now;
        self.applied.as_deref() != Some(hash)
            || self.request.as_deref() != request
            || !self.checked.is_some_and(is_recent)
            || self.scopes.iter().any(|granted| granted.expected.is_some())
    }

    /// Names what a change is about to do. A full ledger has room only for what the change revokes. Returns what is left of the
    /// change, and whether the ledger is full.
    #[must_use]
    pub fn intend(&mut self, change: RoleChange, now: Timestamp) -> (RoleChange, bool) {
        let before = self.clone();
        let takes_room = self.granted(&change.scope).is_none() || change.added().next().is_some();
        self.set(change.intent(now));
        if !takes_room || self.has_room() {
            return (change, false);
        }
        self.restore(&change.scope, &before);
        let rest = change.unproven();
        if rest.is_needed() {
            self.set(rest.intent(now));
        }
        (rest, true)
    }

    /// Whether the operator can still read the ledger, with room for what a revocation adds to it.
    fn has_room(&self) -> bool {
        let size: usize = self.data().values().map(|entry| entry.expose_secret().len()).sum();
        self.scopes.len() <= MOST_SCOPES && size <= key::MAX_BYTES / 2
    }

    /// The entry of a scope.
    #[must_use]
    pub fn granted(&self, scope: &RoleScope) -> Option<&GrantedRoles> {
        self.scopes.iter().find(|granted| granted.scope == *scope)
    }

    /// Whether the operator granted roles that are no longer wanted.
    #[must_use]
    pub fn exceeds(&self, wanted: &[WantedRoles]) -> bool {
        let is_wanted = |granted: &GrantedRoles| {
            let wanted = wanted.iter().find(|wanted| wanted.scope == granted.scope);
            wanted.is_some_and(|wanted| granted.roles.is_subset(&wanted.roles))
        };
        !self.scopes.iter().all(is_wanted)
    }

    /// Replaces the entry of a scope. An entry without roles is removed.
    pub fn set(&mut self, granted: GrantedRoles) {
        self.scopes.retain(|other| other.scope != granted.scope);
        if !granted.roles.is_empty() || granted.expected.is_some() {
            self.scopes.push(granted);
        }
    }

    /// Restores the entry of a scope from another ledger.
    pub fn restore(&mut self, scope: &RoleScope, from: &Self) {
        self.scopes.retain(|other| other.scope != *scope);
        self.scopes.extend(from.granted(scope).cloned());
    }

    /// What is to change in a scope. `held` is what ZITADEL shows there.
    #[must_use]
    pub fn change(&self, scope: &RoleScope, wanted: &[WantedRoles], held: BTreeSet<String>) -> RoleChange {
        let wanted = wanted.iter().find(|wanted| wanted.scope == *scope);
        RoleChange::new(scope, wanted, self.granted(scope), held)
    }
}

/// A change of the roles in one scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleChange {
    /// What the roles are for.
    pub scope: RoleScope,
    /// The roles that ZITADEL shows.
    pub held: BTreeSet<String>,
    /// The roles that the user is to have.
    pub target: BTreeSet<String>,
    /// Those of them that the operator then has granted.
    pub granted: BTreeSet<String>,
    /// Those that the operator had granted before.
    pub before: BTreeSet<String>,
}

impl RoleChange {
    /// A role that the user has and that the operator did not grant stays, unless the mode is exclusive. The operator
    /// claims none that it wants and that the user has already.
    fn new(
        scope: &RoleScope,
        wanted: Option<&WantedRoles>,
        granted: Option<&GrantedRoles>,
        held: BTreeSet<String>,
    ) -> Self {
        let none = BTreeSet::new();
        let before = granted.map_or(&none, |granted| &granted.roles);
        let roles = wanted.map_or(&none, |wanted| &wanted.roles);
        let exclusive = wanted.is_some_and(|wanted| wanted.exclusive);
        let (target, after): (BTreeSet<String>, BTreeSet<String>) = if exclusive {
            (roles.clone(), roles.clone())
        } else {
            let kept = held.iter().filter(|role| !before.contains(*role));
            (
                kept.chain(roles).cloned().collect(),
                roles
                    .iter()
                    .filter(|role| before.contains(*role) || !held.contains(*role))
                    .cloned()
                    .collect(),
            )
        };
        Self {
            scope: scope.clone(),
            target,
            granted: after,
            before: before.clone(),
            held,
        }
    }

    /// The roles that the change adds.
    pub fn added(&self) -> impl Iterator<Item = &String> {
        self.target.difference(&self.held)
    }

    /// The roles that the change removes.
    pub fn removed(&self) -> impl Iterator<Item = &String> {
        self.held.difference(&self.target)
    }

    /// Whether ZITADEL has to change something. Roles that the operator granted and that ZITADEL does not show may only be
    /// invisible, so they are revoked too.
    #[must_use]
    pub fn is_needed(&self) -> bool {
        let revokes = self.granted != self.before;
        self.target != self.held || (self.target.is_empty() && revokes)
    }

    /// Whether the change does more than to take roles from the user that the operator granted to it: it adds roles, claims
    /// them, or takes those of others. The operator then has to know that the object may act for this user.
    #[must_use]
    pub fn needs_proof(&self) -> bool {
        let takes_of_others = self.removed().any(|role| !self.before.contains(role));
        takes_of_others || self.added().next().is_some() || !self.granted.is_subset(&self.before)
    }

    /// What is left of the change without that proof.
    #[must_use]
    pub fn unproven(mut self) -> Self {
        self.granted.retain(|role| self.before.contains(role));
        let revoked = self.before.difference(&self.granted);
        self.target = self.held.clone();
        for role in revoked {
            self.target.remove(role);
        }
        self
    }

    /// Since when ZITADEL does not show what an earlier request has changed, and until when that may last.
    #[must_use]
    pub fn lags(&self, granted: Option<&GrantedRoles>, now: Timestamp) -> Option<(Timestamp, Timestamp)> {
        let expected = granted?.expected.as_ref()?;
        if expected.roles == self.held {
            return None;
        }
        Some((expected.since, lags_until(expected.since, now)?))
    }

    /// The entry of the ledger before the request: it names what the operator granted before and what it is about to
    /// grant, so that a crash loses neither.
    #[must_use]
    pub fn intent(&self, now: Timestamp) -> GrantedRoles {
        GrantedRoles {
            scope: self.scope.clone(),
            roles: self.before.union(&self.granted).cloned().collect(),
            expected: Some(ExpectedRoles {
                roles: self.target.clone(),
                since: now,
            }),
        }
    }

    /// The entry of the ledger once ZITADEL shows the change.
    #[must_use]
    pub fn confirmed(&self) -> GrantedRoles {
        GrantedRoles {
            scope: self.scope.clone(),
            roles: self.granted.clone(),
            expected: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::fixtures::at;

    fn scope() -> RoleScope {
        RoleScope::Organization("1".into())
    }

    fn set(roles: &[&str]) -> BTreeSet<String> {
        roles.iter().map(|role| (*role).to_owned()).collect()
    }

    fn wanted(roles: BTreeSet<String>, exclusive: bool) -> WantedRoles {
        WantedRoles {
            scope: scope(),
            roles,
            if_unprivileged: BTreeSet::new(),
            denied: BTreeSet::new(),
            exclusive,
        }
    }

    fn ledger(granted: BTreeSet<String>) -> RoleLedger {
        let mut ledger = RoleLedger::new("shop/billing".into(), "main", "https://auth.example.com", "7");
        ledger.set(GrantedRoles {
            scope: scope(),
            roles: granted,
            expected: None,
        });
        ledger
    }

    fn change(granted: &[&str], held: &[&str], wanted_roles: Option<(&[&str], bool)>) -> RoleChange {
        let wanted: Vec<_> = wanted_roles
            .into_iter()
            .map(|(roles, exclusive)| wanted(set(roles), exclusive))
            .collect();
        ledger(set(granted)).change(&scope(), &wanted, set(held))
    }

    #[test]
    fn only_granted_roles_are_removed_unless_the_mode_is_exclusive() {
        // granted, held, wanted and exclusive, then target and granted
        for (granted, held, wanted, target, after) in [
            (&[][..], &[][..], Some((&["A"][..], false)), &["A"][..], &["A"][..]),
            // A person granted B.
            (&[], &["B"], Some((&["A"], false)), &["A", "B"], &["A"]),
            // The user had A before: the operator does not claim it.
            (&[], &["A"], Some((&["A"], false)), &["A"], &[]),
            // A person removed A.
            (&["A"], &[], Some((&["A"], false)), &["A"], &["A"]),
            (&["A"], &["A", "B"], Some((&["C"], false)), &["B", "C"], &["C"]),
            (&["A"], &["A", "B"], None, &["B"], &[]),
            (&["A"], &["A"], None, &[], &[]),
            (&["A"], &["A", "B"], Some((&["A"], true)), &["A"], &["A"]),
            (&[], &["A", "B"], Some((&["A"], true)), &["A"], &["A"]),
        ] {
            let change = change(granted, held, wanted);
            assert_eq!(
                (&change.target, &change.granted),
                (&set(target), &set(after)),
                "{granted:?} {held:?}"
            );
        }
        assert!(!change(&["A"], &["A", "B"], Some((&["A"], false))).is_needed());
        // ZITADEL may only not show it.
        assert!(change(&["A"], &[], None).is_needed());
        let added = change(&["A"], &["A", "B"], Some((&["C"], false))).unproven();
        assert_eq!((&added.target, &added.granted), (&set(&["B"]), &set(&[])));
    }

    fn roles() -> impl Strategy<Value = BTreeSet<String>> {
        prop::collection::btree_set("[A-D]", 0..4)
    }

    proptest! {
        /// Whatever was granted, held and wanted: the user gets what is wanted, loses what only the operator granted, and
        /// keeps what others granted. After the change there is nothing to do, also if the process crashed after the request.
        #[test]
        fn change_converges_and_keeps_the_roles_of_others(granted in roles(), held in roles(), now in roles(), exclusive: bool) {
            let ledger = ledger(granted.clone());
            let wanted = [wanted(now.clone(), exclusive)];
            let change = ledger.change(&scope(), &wanted, held.clone());
            let held = &held;
            prop_assert!(change.target.is_superset(&now));
            prop_assert!(change.granted.is_subset(&now));
            if exclusive {
                prop_assert_eq!(&change.target, &now);
            } else {
                let of_others: BTreeSet<_> = held.difference(&granted).cloned().collect();
                prop_assert!(change.target.is_superset(&of_others));
                prop_assert!(change.target.iter().all(|role| now.contains(role) || of_others.contains(role)));
                prop_assert!(change.granted.is_disjoint(&of_others));
            }
            // Without proof, the user loses only what the operator granted, gets nothing, and the operator claims nothing.
            let unproven = change.clone().unproven();
            prop_assert!(unproven.added().next().is_none());
            prop_assert!(unproven.removed().all(|role| granted.contains(role) && !now.contains(role)));
            prop_assert!(unproven.granted.is_subset(&granted));
            prop_assert!(!unproven.needs_proof());
            prop_assert!(!unproven.is_needed() || unproven.before != unproven.granted);
            if !change.needs_proof() {
                prop_assert_eq!(&unproven.target, &change.target);
            }
            for entry in [change.confirmed(), change.intent(at(0))] {
                let mut ledger = ledger.clone();
                ledger.set(entry);
                let again = ledger.change(&scope(), &wanted, change.target.clone());
                prop_assert_eq!(&again.target, &change.target);
                prop_assert_eq!(&again.granted, &change.granted);
            }
        }
    }

    #[test]
    fn ledger_is_due_after_a_change_or_a_long_time() {
        let mut ledger = ledger(set(&["A"]));
        assert!(ledger.is_due("hash", None, at(0)));
        ledger.applied = Some("hash".into());
        ledger.checked = Some(at(0));
        assert!(!ledger.is_due("hash", None, at(6 * 3_600 - 1)));
        assert!(ledger.is_due("hash", None, at(6 * 3_600)));
        assert!(ledger.is_due("other", None, at(0)));
        assert!(ledger.is_due("hash", Some("1"), at(0)));
        let [granted] = &ledger.scopes[..] else {
            panic!("one scope")
        };
        let mut granted = granted.clone();
        granted.expected = Some(ExpectedRoles {
            roles: set(&["A"]),
            since: at(0),
        });
        ledger.set(granted.clone());
        assert!(ledger.is_due("hash", None, at(0)));
        // What ZITADEL does not show yet is waited for.
        let unseen = change(&["A"], &[], None);
        assert_eq!(unseen.lags(Some(&granted), at(29)), Some((at(0), at(30))));
        assert_eq!(unseen.lags(Some(&granted), at(30)), None);
        let seen = change(&["A"], &["A"], None);
        assert_eq!(seen.lags(Some(&granted), at(0)), None);
    }

    #[test]
    fn ledger_names_its_object() {
        let named = |object: &str| RoleLedger {
            object: object.into(),
            ..ledger(set(&["A"]))
        };
        let id = Some(ObjectRef::new("shop", "billing"));
        assert_eq!(named("shop/billing").object_ref(), id);
        assert_eq!(named("prod/shop/billing").object_ref(), id);
        for object in ["", "billing", "shop/", "shop/../billing"] {
            assert_eq!(named(object).object_ref(), None, "{object}");
        }
    }

    fn data(ledger: &RoleLedger) -> BTreeMap<String, SecretSlice<u8>> {
        let data = ledger.data();
        data.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    #[test]
    fn ledger_survives_storage_and_edits_are_noticed() {
        let mut ledger = ledger(set(&["ORG_OWNER"]));
        ledger.set(change(&["A"], &["B"], None).intent(at(0)));
        ledger.set(GrantedRoles {
            scope: RoleScope::ProjectGrant {
                project_id: "1".into(),
                organization_id: "2".into(),
            },
            roles: set(&["PROJECT_GRANT_OWNER"]),
            expected: None,
        });
        assert_eq!(RoleLedger::parse(&data(&ledger)), Ok(ledger.clone()));
        let edits: [fn(&mut RoleLedger); 4] = [
            |ledger| ledger.v = 2,
            |ledger| ledger.user_id = "../7".into(),
            |ledger| ledger.scopes.push(ledger.scopes[0].clone()),
            |ledger| {
                let granted = |id: usize| GrantedRoles {
                    scope: RoleScope::Project(id.to_string()),
                    roles: set(&["PROJECT_OWNER"]),
                    expected: None,
                };
                ledger.scopes = (0..=MOST_SCOPES).map(granted).collect();
            },
        ];
        for edit in edits {
            let mut edited = ledger.clone();
            edit(&mut edited);
            assert_eq!(RoleLedger::parse(&data(&edited)), Err(Reason::RoleLedgerInvalid));
        }
        assert_eq!(RoleLedger::parse(&BTreeMap::new()), Err(Reason::RoleLedgerInvalid));
    }

    #[test]
    fn full_ledger_has_room_for_revocations_only() {
        let mut ledger = ledger(set(&["A"]));
        let grant = change(&["A"], &["A"], Some((&["B"], false)));
        assert_eq!(ledger.clone().intend(grant.clone(), at(0)), (grant.clone(), false));
        let long = |n: usize| format!("ROLE_{n:059}");
        ledger.set(GrantedRoles {
            scope: RoleScope::Instance,
            roles: (0..600).map(long).collect(),
            expected: None,
        });
        let (rest, is_full) = ledger.intend(grant.clone(), at(0));
        assert!(is_full && rest.added().next().is_none());
        assert_eq!(rest.removed().collect::<Vec<_>>(), ["A"]);
        assert!(RoleLedger::parse(&data(&ledger)).is_ok());
        let elsewhere = RoleChange {
            scope: RoleScope::Project("9".into()),
            ..change(&[], &[], Some((&["B"], false)))
        };
        let (rest, is_full) = ledger.intend(elsewhere, at(0));
        assert!(is_full && !rest.is_needed());
        assert_eq!(ledger.granted(&rest.scope), None);
    }
}

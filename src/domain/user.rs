//! A user at ZITADEL (`docs/reference/zitadel-protocol.md#service-users`). Its texts are those of the server, so no
//! message may contain them.

use crate::domain::answer::Format;

/// A user as ZITADEL shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The organization that it belongs to.
    pub organization_id: String,
    /// The username, unique in the instance or in the organization.
    pub username: String,
    /// Whether it can get tokens.
    pub state: UserState,
    /// What a service user has. `None` for a human.
    pub machine: Option<Machine>,
}

/// The fields of a service user that can be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Display name.
    pub name: String,
    /// Description. Empty if there is none.
    pub description: String,
    /// The format of its access tokens.
    pub token_format: Format,
}

/// The state of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserState {
    /// It can get tokens.
    Active,
    /// It was deactivated.
    Inactive,
    /// It was locked.
    Locked,
    /// Any other state.
    Other,
}

//! Writes ledgers: Secrets in the operator's namespace in which it keeps what it made at ZITADEL. If another process wrote a
//! ledger meanwhile, this one stops.

use std::collections::BTreeMap;

use secrecy::SecretSlice;

use crate::controller::Context;
use crate::controller::write::WriteError;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::stored::Stored;

/// Where the ledger of an object is.
pub struct Place<'a> {
    /// The object.
    pub id: &'a ObjectRef,
    /// Name of the Secret.
    pub name: String,
    /// Label of the Secret. Its value is `key`.
    pub label: &'static str,
    /// What tells the ledger from those of other objects.
    pub key: &'a str,
}

/// Writes `ledger` in the place of `stored`.
pub async fn store<L>(
    ctx: &Context,
    place: &Place<'_>,
    stored: Option<&Stored<L>>,
    ledger: L,
    data: BTreeMap<&'static str, SecretSlice<u8>>,
) -> Result<Stored<L>, Reason> {
    let stored = stored.map(|stored| stored.secret(&place.name));
    let written = ctx
        .writer
        .write_ledger(namespace(ctx)?, place, stored.as_ref(), data)
        .await;
    let (uid, resource_version) = written.map_err(|error| failed(place.id, &error))?;
    Ok(Stored {
        ledger,
        uid,
        resource_version,
    })
}

/// Deletes a ledger.
pub async fn delete<L>(ctx: &Context, place: &Place<'_>, stored: &Stored<L>) -> Result<(), Reason> {
    let secret = stored.secret(&place.name);
    let deleted = ctx.writer.delete_secret(namespace(ctx)?, &secret).await;
    deleted.map_err(|error| failed(place.id, &error))
}

/// Why a ledger, or a finalizer that goes with it, could not be written.
#[must_use]
pub fn failed(id: &ObjectRef, error: &WriteError) -> Reason {
    error.log(id, "a ledger or the finalizer");
    error.reason_for_ledger()
}

/// The namespace of all ledgers.
pub fn namespace(ctx: &Context) -> Result<&str, Reason> {
    ctx.operator_namespace.as_deref().ok_or(Reason::LedgerUnavailable)
}

//! Owns the cluster IPs and node ports of Services: taken and given back in the transaction that writes the Service.
//!
//! A cluster IP is an IPAddress object of that name, as upstream's (KEP-1880); a node port is a key of its own. Both must
//! be absent when the Service is written, so two Services never get the same one, whatever races; and a crash leaves
//! both the Service and what it has, or neither.

mod addresses;
mod ports;
mod repair;

pub(crate) use addresses::usage;
pub(crate) use repair::run as repair;

use crate::api::Api;
use crate::registry::Extra;
use serde_json::Value;
use std::collections::BTreeSet;
use weft_control_api::field::FieldError;
use weft_control_api::kinds::Kind;
use weft_control_api::status::{GroupKind, Status};
use weft_control_api::strategy;

fn is_service(kind: &Kind) -> bool {
    kind.group.is_empty() && kind.kind == "Service"
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object[key].as_str().unwrap_or_default()
}

fn invalid(service: &Value, errors: Vec<FieldError>) -> Status {
    let kind = GroupKind { group: "", kind: "Service" };
    Status::invalid(kind, text(&service["metadata"], "name"), errors)
}

/// Gives a new Service what it needs.
pub(crate) async fn on_create(
    api: &Api,
    kind: &Kind,
    object: &mut Value,
    extra: &mut Extra,
) -> Result<(), Status> {
    if !is_service(kind) {
        return Ok(());
    }
    settle(api, object, None)?;
    addresses::take(api, object, &BTreeSet::new(), extra).await?;
    ports::take(api, object, None, extra).await
}

/// Gives a changed Service what it needs now, and takes back what it doesn't.
pub(crate) async fn on_update(
    api: &Api,
    kind: &Kind,
    new: &mut Value,
    old: &Value,
    extra: &mut Extra,
) -> Result<(), Status> {
    if !is_service(kind) {
        return Ok(());
    }
    settle(api, new, Some(old))?;
    let had = addresses::of(&old["spec"]);
    addresses::take(api, new, &had, extra).await?;
    ports::take(api, new, Some(&old["spec"]), extra).await?;
    let has = addresses::of(&new["spec"]);
    addresses::release(api, old, had.difference(&has), extra);
    ports::release(&old["spec"], &ports::of(&new["spec"]), extra);
    Ok(())
}

/// Takes back everything.
pub(crate) fn on_delete(api: &Api, kind: &Kind, object: &Value, extra: &mut Extra) {
    if !is_service(kind) {
        return;
    }
    addresses::release(api, object, addresses::of(&object["spec"]).iter(), extra);
    ports::release(&object["spec"], &BTreeSet::new(), extra);
}

fn settle(api: &Api, service: &mut Value, old: Option<&Value>) -> Result<(), Status> {
    let errors = strategy::settle_families(service, old, &api.config.service_families());
    if errors.is_empty() { Ok(()) } else { Err(invalid(service, errors)) }
}

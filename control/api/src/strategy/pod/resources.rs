//! Resources of containers: sums, quality of service, and requests against limits.

use serde_json::Value;

use super::super::checks::{Errors, NOT_NEGATIVE, problems};
use super::super::value::{entries, items, text};
use crate::field::{FieldError, FieldPath};
use crate::names;
use crate::quantity::Quantity;

/// A quantity as it stands in an object: text, or a plain number.
pub(in super::super) fn quantity(value: &Value) -> Option<Quantity> {
    match value.as_str() {
        Some(text) => text.parse().ok(),
        None => value.as_number()?.to_string().parse().ok(),
    }
}

/// A quantity in canonical form with nothing finer than a thousandth; what is no quantity stays as it is.
pub(super) fn rounded_up_to_milli(value: &Value) -> Value {
    let Some(amount) = quantity(value) else { return value.clone() };
    let millis = amount.millis();
    // At the cap of an i64 thousandths are too fine a unit, and nothing is there to be rounded.
    let exact = millis == i64::MAX || millis == i64::MIN || Quantity::from_millis(millis) == amount;
    if exact { amount.to_string().into() } else { Quantity::from_millis(millis).to_string().into() }
}

fn is_sidecar(container: &Value) -> bool {
    container["restartPolicy"] == "Always"
}

/// What the containers of a pod request together of one resource: the larger of what runs for long and what each step of
/// the initialization needs. None if no container names the resource.
pub(super) fn pod_request(spec: &Value, resource: &str) -> Option<String> {
    let request = |container: &Value| quantity(&container["resources"]["requests"][resource]);
    let mut named = false;
    let mut running = Quantity::ZERO;
    for amount in items(&spec["containers"]).iter().filter_map(request) {
        named = true;
        running += amount;
    }
    let mut sidecars = Quantity::ZERO;
    let mut peak = Quantity::ZERO;
    for container in items(&spec["initContainers"]) {
        let Some(amount) = request(container) else { continue };
        named = true;
        if is_sidecar(container) {
            sidecars += amount;
            running += amount;
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars + amount);
        }
    }
    named.then(|| running.max(peak).to_string())
}

/// `Guaranteed`, `Burstable` or `BestEffort`.
pub(super) fn quality_of_service(spec: &Value) -> &'static str {
    let pod = &spec["resources"];
    if entries(&pod["requests"])
        .chain(entries(&pod["limits"]))
        .any(|(name, _)| matches!(name, "cpu" | "memory"))
    {
        return class_of(&[pod]);
    }
    let containers = items(&spec["containers"]).iter().chain(items(&spec["initContainers"]));
    let resources: Vec<_> = containers.map(|container| &container["resources"]).collect();
    class_of(&resources)
}

fn class_of(resources: &[&Value]) -> &'static str {
    let amount =
        |one: &Value, list: &str, name: &str| quantity(&one[list][name]).filter(|amount| !amount.is_zero());
    let mut any = false;
    let mut guaranteed = true;
    for one in resources {
        for name in ["cpu", "memory"] {
            let (request, limit) = (amount(one, "requests", name), amount(one, "limits", name));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// Resources without a domain that containers know.
const STANDARD: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];

fn is_standard(resource: &str) -> bool {
    STANDARD.contains(&resource) || resource.starts_with("hugepages-")
}

/// Resources of a kind that a node can't hand out twice.
fn is_exclusive(resource: &str) -> bool {
    !STANDARD.contains(&resource)
}

/// Requests and limits of a container at `path` (its `resources`).
pub(super) fn validate(errors: &mut Errors, path: &FieldPath, resources: &Value) {
    let (limits, requests) = (&resources["limits"], &resources["requests"]);
    for (list, amounts) in [("limits", limits), ("requests", requests)] {
        for (name, amount) in entries(amounts) {
            let path = path.child(list).key(name);
            resource_name(errors, &path, name);
            resource_amount(errors, &path, name, amount);
        }
    }
    claims(errors, &path.child("claims"), &resources["claims"]);
    let path = path.child("requests");
    for (name, request) in entries(requests) {
        let (Some(request), limit) = (quantity(request), quantity(&limits[name])) else { continue };
        match limit {
            Some(limit) if is_exclusive(name) && request != limit => {
                let detail = format!("must be equal to {name} limit of {limit}");
                errors.push(FieldError::invalid(&path, request.to_string(), detail));
            }
            Some(limit) if request > limit => {
                let detail = format!("must be less than or equal to {name} limit of {limit}");
                errors.push(FieldError::invalid(&path, request.to_string(), detail));
            }
            None if is_exclusive(name) => {
                errors
                    .push(FieldError::required(&path, "Limit must be set for non overcommitable resources"));
            }
            Some(_) | None => {}
        }
    }
}

fn claims(errors: &mut Errors, path: &FieldPath, claims: &Value) {
    for (index, claim) in items(claims).iter().enumerate() {
        if text(&claim["name"]).is_empty() {
            errors.push(FieldError::required(&path.index(index), ""));
        }
    }
}

fn resource_name(errors: &mut Errors, path: &FieldPath, name: &str) {
    let bad = names::qualified_name(name);
    if !bad.is_empty() {
        return problems(errors, path, name, bad);
    }
    if !name.contains('/') && !is_standard(name) {
        errors.push(FieldError::invalid(path, name, "must be a standard resource for containers"));
    }
}

/// A quantity that may not be negative; whole, for what can't be divided.
pub(in super::super) fn resource_amount(errors: &mut Errors, path: &FieldPath, name: &str, amount: &Value) {
    let Some(amount) = quantity(amount) else { return };
    if amount.signum() < 0 {
        errors.push(FieldError::invalid(path, amount.to_string(), NOT_NEGATIVE));
    }
    let whole =
        name.contains('/') && !name.starts_with("kubernetes.io/") && !name.contains(".kubernetes.io/");
    if whole && amount.millis() % 1000 != 0 {
        errors.push(FieldError::invalid(path, amount.to_string(), "must be an integer"));
    }
}

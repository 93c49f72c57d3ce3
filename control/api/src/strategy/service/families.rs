//! Which address families a Service gets: of what it asks for, what it had, and what the cluster has.

use serde_json::{Value, json};

use super::super::checks::Errors;
use super::super::value::{at, copy, is_empty, items, text};
use super::addresses;
use crate::field::{FieldError, FieldPath};

/// Brings `ipFamilies`, `ipFamilyPolicy` and, on the way down to one family, `clusterIPs` of a prepared Service into
/// their final state. `configured` are the cluster's families, the default one first. What is wrong is returned, and
/// then the Service isn't to be written.
pub fn settle_families(service: &mut Value, old: Option<&Value>, configured: &[&str]) -> Errors {
    let mut errors = Vec::new();
    let old = old.map(|old| &old["spec"]);
    let Some(spec) = at(service, &["spec"]) else { return errors };
    if spec["type"] == "ExternalName" || old.is_some_and(|old| stays_preferred(spec, old)) {
        return errors;
    }
    set_policy(spec, old);
    addresses::related(&mut errors, spec);
    if !errors.is_empty() {
        return errors;
    }
    if let Some(old) = old {
        narrow(&mut errors, spec, old);
    }
    one_for_single(&mut errors, spec);
    infer(&mut errors, spec, configured);
    if !errors.is_empty() {
        return errors;
    }
    if spec["clusterIP"] == "None" && is_empty(&spec["selector"]) {
        // Whoever makes the endpoints may make them of any family, whatever the cluster has.
        complete(spec, configured, &["IPv4", "IPv6"]);
        return errors;
    }
    demand(&mut errors, spec, configured);
    if errors.is_empty() {
        complete(spec, configured, configured);
    }
    errors
}

/// A Service that prefers dual stack isn't changed because the cluster changed, but when its author says so.
fn stays_preferred(spec: &Value, old: &Value) -> bool {
    let preferred = |policy: &Value| is_empty(policy) || policy == "PreferDualStack";
    !is_empty(&spec["ipFamilyPolicy"])
        && spec["type"] == old["type"]
        && preferred(&spec["ipFamilyPolicy"])
        && preferred(&old["ipFamilyPolicy"])
        && same_list(spec, old, "clusterIPs")
        && same_list(spec, old, "ipFamilies")
}

fn same_list(spec: &Value, old: &Value, field: &str) -> bool {
    items(&spec[field]) == items(&old[field])
}

fn set_policy(spec: &mut Value, old: Option<&Value>) {
    if !is_empty(&spec["ipFamilyPolicy"]) {
        return;
    }
    match old {
        Some(old) if !is_empty(&old["ipFamilyPolicy"]) => copy(spec, old, "ipFamilyPolicy"),
        _ => {
            let open = spec["clusterIP"] == "None" && is_empty(&spec["selector"]);
            spec["ipFamilyPolicy"] = if open { "RequireDualStack" } else { "SingleStack" }.into();
        }
    }
}

fn policy_error(errors: &mut Errors, spec: &Value, detail: &str) {
    let path = FieldPath::new("spec").child("ipFamilyPolicy");
    errors.push(FieldError::invalid(&path, spec["ipFamilyPolicy"].clone(), detail));
}

/// Saying `SingleStack` is enough to give the second address back; without it, nothing may be taken away.
fn narrow(errors: &mut Errors, spec: &mut Value, old: &Value) {
    if spec["ipFamilyPolicy"] == "SingleStack" {
        for field in ["clusterIPs", "ipFamilies"] {
            if same_list(spec, old, field)
                && let Some(list) = spec.get_mut(field).and_then(Value::as_array_mut)
            {
                list.truncate(1);
            }
        }
        return;
    }
    for (field, what) in [("clusterIPs", "cluster IP"), ("ipFamilies", "IP family")] {
        let (list, before) = (items(&spec[field]), items(&old[field]));
        if !list.is_empty() && list.len() < before.len() {
            policy_error(errors, spec, &format!("must be 'SingleStack' to release the secondary {what}"));
        }
    }
}

fn one_for_single(errors: &mut Errors, spec: &Value) {
    if spec["ipFamilyPolicy"] != "SingleStack" {
        return;
    }
    for (field, what) in [("clusterIPs", "cluster IPs"), ("ipFamilies", "IP families")] {
        if items(&spec[field]).len() == 2 {
            let detail =
                format!("must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified");
            policy_error(errors, spec, &detail);
        }
    }
}

/// Families that aren't said follow from the addresses that are.
fn infer(errors: &mut Errors, spec: &mut Value, configured: &[&str]) {
    let addresses = items(&spec["clusterIPs"]).to_vec();
    for (index, address) in addresses.iter().enumerate() {
        if address == "None" {
            return;
        }
        let Some(family) = addresses::family(text(address)) else { continue };
        if index < items(&spec["ipFamilies"]).len() {
            continue;
        }
        if configured.contains(&family) {
            add(spec, family);
        } else {
            let path = FieldPath::new("spec").child("clusterIPs").index(index);
            let detail = format!("{family} is not configured on this cluster");
            errors.push(FieldError::invalid(&path, spec["clusterIPs"].clone(), detail));
        }
    }
}

fn add(spec: &mut Value, family: &str) {
    match spec.get_mut("ipFamilies").and_then(Value::as_array_mut) {
        Some(list) => list.push(family.into()),
        None => spec["ipFamilies"] = json!([family]),
    }
}

/// What is asked for must be there.
fn demand(errors: &mut Errors, spec: &Value, configured: &[&str]) {
    if spec["ipFamilyPolicy"] == "RequireDualStack" && configured.len() < 2 {
        policy_error(errors, spec, "this cluster is not configured for dual-stack services");
    }
    for (index, family) in items(&spec["ipFamilies"]).iter().enumerate() {
        if !configured.contains(&text(family)) {
            let path = FieldPath::new("spec").child("ipFamilies").index(index);
            errors.push(FieldError::invalid(&path, family.clone(), "not configured on this cluster"));
        }
    }
}

/// The default family where none is said, and the other one where two are wanted and there are.
fn complete(spec: &mut Value, configured: &[&str], possible: &[&str]) {
    if is_empty(&spec["ipFamilies"])
        && let Some(default) = configured.first()
    {
        spec["ipFamilies"] = json!([default]);
    }
    if spec["ipFamilyPolicy"] == "SingleStack" || items(&spec["ipFamilies"]).len() != 1 {
        return;
    }
    let first = text(&spec["ipFamilies"][0]).to_owned();
    if let Some(other) = possible.iter().find(|family| **family != first) {
        add(spec, other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(spec: Value, old: Option<Value>, configured: &[&str]) -> Result<Value, Vec<String>> {
        let mut service = json!({"spec": spec});
        let old = old.map(|spec| json!({"spec": spec}));
        let errors = settle_families(&mut service, old.as_ref(), configured);
        if errors.is_empty() {
            return Ok(json!([
                service["spec"]["ipFamilyPolicy"],
                service["spec"]["ipFamilies"],
                service["spec"]["clusterIPs"]
            ]));
        }
        Err(errors.iter().map(ToString::to_string).collect())
    }

    const DUAL: &[&str] = &["IPv4", "IPv6"];

    #[test]
    fn new_services() {
        let rows = [
            (json!({"type": "ClusterIP"}), DUAL, json!(["SingleStack", ["IPv4"], null])),
            (json!({"type": "ClusterIP"}), &["IPv6", "IPv4"], json!(["SingleStack", ["IPv6"], null])),
            (
                json!({"type": "ClusterIP", "ipFamilyPolicy": "PreferDualStack"}),
                DUAL,
                json!(["PreferDualStack", ["IPv4", "IPv6"], null]),
            ),
            (
                json!({"type": "ClusterIP", "ipFamilyPolicy": "PreferDualStack"}),
                &["IPv4"],
                json!(["PreferDualStack", ["IPv4"], null]),
            ),
            (
                json!({"type": "ClusterIP", "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}),
                DUAL,
                json!(["RequireDualStack", ["IPv6", "IPv4"], null]),
            ),
            (
                json!({"type": "ClusterIP", "clusterIP": "fd00::7", "clusterIPs": ["fd00::7"]}),
                DUAL,
                json!(["SingleStack", ["IPv6"], ["fd00::7"]]),
            ),
            (
                json!({"type": "ClusterIP", "clusterIP": "None", "clusterIPs": ["None"]}),
                &["IPv4"],
                json!(["RequireDualStack", ["IPv4", "IPv6"], ["None"]]),
            ),
            (
                json!({"type": "ClusterIP", "clusterIP": "None", "clusterIPs": ["None"], "selector": {"a": "b"}}),
                DUAL,
                json!(["SingleStack", ["IPv4"], ["None"]]),
            ),
            (json!({"type": "ExternalName"}), DUAL, json!([null, null, null])),
        ];
        for (spec, configured, expected) in rows {
            assert_eq!(settled(spec.clone(), None, configured), Ok(expected), "{spec}");
        }
    }

    #[test]
    fn upgrades_and_downgrades() {
        let single = json!({"type": "ClusterIP", "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"],
            "clusterIP": "10.0.0.5", "clusterIPs": ["10.0.0.5"]});
        let mut dual = single.clone();
        dual["ipFamilyPolicy"] = json!("RequireDualStack");
        let up = settled(dual.clone(), Some(single.clone()), DUAL);
        assert_eq!(up, Ok(json!(["RequireDualStack", ["IPv4", "IPv6"], ["10.0.0.5"]])));
        dual["ipFamilies"] = json!(["IPv4", "IPv6"]);
        dual["clusterIPs"] = json!(["10.0.0.5", "fd00::5"]);
        let mut down = dual.clone();
        down["ipFamilyPolicy"] = json!("SingleStack");
        let down = settled(down, Some(dual.clone()), DUAL);
        assert_eq!(down, Ok(json!(["SingleStack", ["IPv4"], ["10.0.0.5"]])));
        let mut reduced = dual.clone();
        reduced["clusterIPs"] = json!(["10.0.0.5"]);
        assert_eq!(
            settled(reduced, Some(dual.clone()), DUAL),
            Err(vec![
                "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": must be 'SingleStack' to release the \
                 secondary cluster IP"
                    .to_owned()
            ])
        );
        // A cluster that grew a family doesn't change who was content with one.
        let mut content = single.clone();
        content["ipFamilyPolicy"] = json!("PreferDualStack");
        let kept = settled(content.clone(), Some(content), DUAL);
        assert_eq!(kept, Ok(json!(["PreferDualStack", ["IPv4"], ["10.0.0.5"]])));
    }

    #[test]
    fn what_cannot_be() {
        let rows = [
            (
                json!({"type": "ClusterIP", "ipFamilyPolicy": "RequireDualStack"}),
                "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services",
            ),
            (
                json!({"type": "ClusterIP", "ipFamilies": ["IPv6"]}),
                "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster",
            ),
            (
                json!({"type": "ClusterIP", "clusterIP": "fd00::1", "clusterIPs": ["fd00::1"]}),
                "spec.clusterIPs[0]: Invalid value: [\"fd00::1\"]: IPv6 is not configured on this cluster",
            ),
            (
                json!({"type": "ClusterIP", "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4", "IPv6"]}),
                "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified",
            ),
            (
                json!({"type": "ClusterIP", "ipFamilies": ["IPv6"], "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"]}),
                "spec.clusterIPs[0]: Invalid value: \"10.0.0.1\": expected an IPv6 value as indicated by `ipFamilies[0]`",
            ),
            (
                json!({"type": "ClusterIP", "clusterIPs": ["10.0.0.1"]}),
                "spec.clusterIPs: Invalid value: [\"10.0.0.1\"]: must be empty when `clusterIP` is not specified",
            ),
            (
                json!({"type": "ClusterIP", "ipFamilies": ["IPv5"]}),
                "spec.ipFamilies[0]: Unsupported value: \"IPv5\": supported values: \"IPv4\", \"IPv6\"",
            ),
        ];
        for (spec, expected) in rows {
            assert_eq!(settled(spec.clone(), None, &["IPv4"]), Err(vec![expected.to_owned()]), "{spec}");
        }
    }
}

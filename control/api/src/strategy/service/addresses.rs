//! Validation of what a Service says about addresses and families.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;

use super::super::checks::{Errors, optional_one_of, problems};
use super::super::value::{is_empty, items, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];
const FAMILY_POLICIES: [&str; 3] = ["PreferDualStack", "RequireDualStack", "SingleStack"];

/// The family of an address.
pub(super) fn family(address: &str) -> Option<&'static str> {
    address.parse().ok().map(|address: IpAddr| if address.is_ipv4() { "IPv4" } else { "IPv6" })
}

/// Whether a Service has no address of its own.
pub(super) fn is_headless(spec: &Value) -> bool {
    matches!(items(&spec["clusterIPs"]), [one] if one == "None")
}

/// `clusterIP`, `clusterIPs`, `ipFamilies` and `ipFamilyPolicy`, each alone and with each other.
pub(super) fn related(errors: &mut Errors, spec: &Value) {
    if spec["type"] == "ExternalName" {
        return;
    }
    let path = FieldPath::new("spec");
    let at = path.child("clusterIPs");
    let list = items(&spec["clusterIPs"]);
    match (text(&spec["clusterIP"]), list.first()) {
        ("", Some(_)) => {
            let detail = "must be empty when `clusterIP` is not specified";
            errors.push(FieldError::invalid(&at, spec["clusterIPs"].clone(), detail));
        }
        ("", None) => {}
        (_, None) => errors.push(FieldError::required(&at, "")),
        (one, Some(first)) if first != one => {
            let detail = "first value must match `clusterIP`";
            errors.push(FieldError::invalid(&at, spec["clusterIPs"].clone(), detail));
        }
        (_, Some(_)) => {}
    }
    let mut seen = BTreeSet::new();
    for (index, family) in items(&spec["ipFamilies"]).iter().enumerate() {
        let at = path.child("ipFamilies").index(index);
        if !FAMILIES.contains(&text(family)) {
            errors.push(FieldError::not_supported(&at, family.clone(), &FAMILIES));
        }
        if !seen.insert(text(family)) {
            errors.push(FieldError::duplicate(&at, family.clone()));
        }
    }
    optional_one_of(errors, &path.child("ipFamilyPolicy"), &spec["ipFamilyPolicy"], &FAMILY_POLICIES);
    if each_is_an_address(errors, &at, &spec["clusterIPs"]) {
        agree(errors, &at, spec);
    }
}

/// Whether all are addresses, or the first and only one is `None`.
fn each_is_an_address(errors: &mut Errors, at: &FieldPath, value: &Value) -> bool {
    let (before, list) = (errors.len(), items(value));
    for (index, address) in list.iter().enumerate() {
        if index == 0 && address == "None" {
            if list.len() > 1 {
                let detail = "'None' must be the first and only value";
                errors.push(FieldError::invalid(at, value.clone(), detail));
            }
            continue;
        }
        problems(errors, &at.index(index), text(address), names::ip(text(address)));
    }
    let good = errors.len() == before;
    if list.len() > 2 {
        errors.push(FieldError::invalid(at, value.clone(), "may only hold up to 2 values"));
    }
    good
}

/// One address of each family at most, each of the family at its place.
fn agree(errors: &mut Errors, at: &FieldPath, spec: &Value) {
    let list: Vec<&str> = items(&spec["clusterIPs"]).iter().map(text).collect();
    let kinds: BTreeSet<_> = list.iter().map(|address| family(address)).collect();
    if list.len() > 1 && kinds.len() < list.len() {
        let detail = "may specify no more than one IP for each IP family";
        errors.push(FieldError::invalid(at, spec["clusterIPs"].clone(), detail));
    }
    if is_headless(spec) {
        return;
    }
    for (index, (address, wanted)) in list.iter().zip(items(&spec["ipFamilies"])).enumerate() {
        let wanted = text(wanted);
        if FAMILIES.contains(&wanted) && family(address) != Some(wanted) {
            let detail = format!("expected an {wanted} value as indicated by `ipFamilies[{index}]`");
            errors.push(FieldError::invalid(&at.index(index), *address, detail));
        }
    }
}

/// An update may add or take away the second address and family, and nothing else.
pub(super) fn change(errors: &mut Errors, new: &Value, old: &Value) {
    if old["type"] == "ExternalName" || new["type"] == "ExternalName" {
        return;
    }
    let (headless, was_headless) = (is_headless(new), is_headless(old));
    if !(headless && was_headless) {
        list_change(errors, new, old, ("clusterIPs", "primary clusterIP", "clusterIP"));
    }
    if !headless && !was_headless {
        list_change(errors, new, old, ("ipFamilies", "primary ipFamily", "ipFamily"));
    }
}

fn list_change(errors: &mut Errors, new: &Value, old: &Value, (field, first, one): (&str, &str, &str)) {
    let path = FieldPath::new("spec").child(field);
    let (value, list, before) = (&new[field], items(&new[field]), items(&old[field]));
    let mut fixed = |index: usize| {
        errors.push(FieldError::invalid(&path.index(index), value.clone(), "may not change once set"));
    };
    if list.len() == before.len() {
        for index in 0..list.len() {
            if list[index] != before[index] {
                // Upstream names the first family whichever changed.
                fixed(if field == "ipFamilies" { 0 } else { index });
            }
        }
        return;
    }
    if list.is_empty() {
        let detail = format!("{first} can not be unset");
        errors.push(FieldError::invalid(&path.index(0), value.clone(), detail));
        return;
    }
    if !before.is_empty() && list[0] != before[0] {
        fixed(0);
    }
    if list.len() == 1 && before.len() > 1 && new["ipFamilyPolicy"] != "SingleStack" {
        let detail = format!("must be set to 'SingleStack' when releasing the secondary {one}");
        let path = FieldPath::new("spec").child("ipFamilyPolicy");
        errors.push(FieldError::invalid(&path, new["ipFamilyPolicy"].clone(), detail));
    }
}

/// An ExternalName is a name: it has neither addresses nor families.
pub(super) fn none_for_external_name(errors: &mut Errors, spec: &Value) {
    for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        if !is_empty(&spec[field]) {
            let path = FieldPath::new("spec").child(field);
            errors.push(FieldError::forbidden(&path, "may not be set for ExternalName services"));
        }
    }
}

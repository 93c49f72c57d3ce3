//! Validation of ServiceCIDRs and IPAddresses.

use serde_json::Value;

use super::super::Change;
use super::super::checks::{Errors, IMMUTABLE, immutable, optional_name, problems, required_name};
use super::super::value::{items, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

pub(super) fn service_cidr(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec").child("cidrs");
    let cidrs: Vec<&str> = items(&object["spec"]["cidrs"]).iter().map(text).collect();
    let family = |cidr: &str| cidr.parse::<ipnetwork::IpNetwork>().ok().map(|network| network.is_ipv4());
    let whole = |detail: &str| FieldError::invalid(&path, object["spec"].clone(), detail);
    match cidrs.as_slice() {
        [] => errors.push(FieldError::required(&path, "at least one CIDR required")),
        [_, _, _, ..] => errors.push(whole("may only hold up to 2 values")),
        [one, other] if !matches!((family(one), family(other)), (Some(a), Some(b)) if a != b) => {
            errors.push(whole(
                "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64",
            ));
        }
        _ => {
            for (index, cidr) in cidrs.iter().enumerate() {
                problems(errors, &path.index(index), cidr, names::strict_cidr(cidr));
            }
        }
    }
}

/// A range stays; a second one may come, of the other family.
pub(super) fn service_cidr_update(change: &Change<'_>, errors: &mut Errors) {
    let path = FieldPath::new("spec").child("cidrs");
    let (new, old) = (items(&change.new["spec"]["cidrs"]), items(&change.old["spec"]["cidrs"]));
    let grown = old.len() == 1 && new.len() == 2;
    if !grown && new.len() != old.len() {
        let value = change.new["spec"]["cidrs"].clone();
        errors.push(FieldError::invalid(&path, value, IMMUTABLE));
        return;
    }
    for (index, (new, old)) in new.iter().zip(old).enumerate() {
        if new != old {
            errors.push(FieldError::invalid(&path.index(index), new.clone(), IMMUTABLE));
        }
    }
}

pub(super) fn ip_address(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec").child("parentRef");
    let parent = &object["spec"]["parentRef"];
    if parent.is_null() {
        errors.push(FieldError::required(&path, ""));
        return;
    }
    optional_name(errors, &path.child("group"), &parent["group"], names::dns1123_subdomain);
    for field in ["resource", "name"] {
        required_name(errors, &path.child(field), &parent[field], names::path_segment);
    }
    optional_name(errors, &path.child("namespace"), &parent["namespace"], names::path_segment);
}

pub(super) fn ip_address_update(change: &Change<'_>, errors: &mut Errors) {
    let path = FieldPath::new("spec").child("parentRef");
    immutable(errors, &path, &change.new["spec"]["parentRef"], &change.old["spec"]["parentRef"]);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn texts(errors: Errors) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ranges() {
        let rows = [
            (json!([]), Some("spec.cidrs: Required value: at least one CIDR required")),
            (json!(["10.0.0.0/16"]), None),
            (json!(["10.0.0.0/16", "fd00::/112"]), None),
            (
                json!(["10.0.0.0/16", "10.1.0.0/16"]),
                Some(
                    "spec.cidrs: Invalid value: {\"cidrs\":[\"10.0.0.0/16\",\"10.1.0.0/16\"]}: may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64",
                ),
            ),
            (
                json!(["10.0.0.1/16"]),
                Some(
                    "spec.cidrs[0]: Invalid value: \"10.0.0.1/16\": must not have bits set beyond the prefix length",
                ),
            ),
            (
                json!(["FD00::/64"]),
                Some(
                    "spec.cidrs[0]: Invalid value: \"FD00::/64\": must be in canonical form (\"fd00::/64\")",
                ),
            ),
            (
                json!(["10.0.0.0"]),
                Some(
                    "spec.cidrs[0]: Invalid value: \"10.0.0.0\": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
                ),
            ),
        ];
        for (cidrs, expected) in rows {
            let mut errors = Vec::new();
            service_cidr(&json!({"spec": {"cidrs": cidrs}}), &mut errors);
            assert_eq!(texts(errors), expected.map(str::to_owned).into_iter().collect::<Vec<_>>(), "{cidrs}");
        }
    }

    #[test]
    fn a_range_may_get_a_companion_and_nothing_else() {
        let change = |old: Value, new: Value| {
            let (old, new) = (json!({"spec": {"cidrs": old}}), json!({"spec": {"cidrs": new}}));
            let mut errors = Vec::new();
            service_cidr_update(&Change { subresource: None, new: &new, old: &old }, &mut errors);
            texts(errors)
        };
        assert!(change(json!(["10.0.0.0/16"]), json!(["10.0.0.0/16", "fd00::/112"])).is_empty());
        assert_eq!(
            change(json!(["10.0.0.0/16"]), json!(["10.1.0.0/16"])),
            ["spec.cidrs[0]: Invalid value: \"10.1.0.0/16\": field is immutable"]
        );
        assert_eq!(
            change(json!(["10.0.0.0/16", "fd00::/112"]), json!(["10.0.0.0/16"])),
            ["spec.cidrs: Invalid value: [\"10.0.0.0/16\"]: field is immutable"]
        );
    }

    #[test]
    fn an_address_has_a_parent() {
        let check = |spec: Value| {
            let mut errors = Vec::new();
            ip_address(&json!({"spec": spec}), &mut errors);
            texts(errors)
        };
        assert!(
            check(json!({"parentRef": {"resource": "services", "name": "a", "namespace": "b"}})).is_empty()
        );
        assert_eq!(check(json!({})), ["spec.parentRef: Required value"]);
        assert_eq!(
            check(json!({"parentRef": {"group": "A", "name": "x/y"}})).len(),
            3,
            "a bad group, no resource, a bad name"
        );
    }
}

//! Services and what surrounds them.

mod addresses;
mod defaults;
mod endpoints;
mod families;
mod ingress;
mod prepare;
mod ranges;
mod validation;

use serde_json::Value;

use super::Change;
use super::checks::Errors;

pub(super) use defaults::apply as default;
pub use families::settle_families;
pub(super) use prepare::{create as prepare_create, update as prepare_update};

pub(super) fn create(group: &str, kind: &str, object: &Value, errors: &mut Errors) {
    match (group, kind) {
        ("", "Service") => validation::service(object, errors),
        ("", "Endpoints") => endpoints::endpoints(object, errors),
        ("discovery.k8s.io", "EndpointSlice") => endpoints::slice(object, errors),
        ("networking.k8s.io", "Ingress") => {
            ingress::ingress_create(object, errors);
            ingress::ingress(object, errors);
        }
        ("networking.k8s.io", "IngressClass") => ingress::class(object, errors),
        ("networking.k8s.io", "NetworkPolicy") => ingress::network_policy(object, errors),
        ("networking.k8s.io", "ServiceCIDR") => ranges::service_cidr(object, errors),
        ("networking.k8s.io", "IPAddress") => ranges::ip_address(object, errors),
        _ => {}
    }
}

pub(super) fn update(group: &str, kind: &str, change: &Change<'_>, errors: &mut Errors) {
    if change.subresource.is_some() {
        match (group, kind) {
            ("", "Service") => validation::service_status(change.new, errors),
            ("networking.k8s.io", "Ingress") => ingress::ingress_status(change.new, errors),
            _ => {}
        }
        return;
    }
    // What may not change is told first, as upstream.
    match (group, kind) {
        ("", "Service") => validation::service_update(change, errors),
        ("discovery.k8s.io", "EndpointSlice") => endpoints::slice_update(change, errors),
        ("networking.k8s.io", "IngressClass") => ingress::class_update(change, errors),
        ("networking.k8s.io", "ServiceCIDR") => ranges::service_cidr_update(change, errors),
        ("networking.k8s.io", "Ingress") => return ingress::ingress(change.new, errors),
        ("networking.k8s.io", "IPAddress") => return ranges::ip_address_update(change, errors),
        _ => {}
    }
    create(group, kind, change.new, errors);
}

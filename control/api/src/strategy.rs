//! What a schema can't say about a kind: defaults that depend on other fields, what each way of writing may touch,
//! validation across fields, and the fields that selectors may name.
//!
//! Every function is pure and total: an object that its schema would reject gives errors or is left alone, never a panic.

mod checks;
mod cluster;
mod config;
mod fields;
mod metadata;
mod pod;
mod policy;
mod prepare;
mod scale;
mod service;
mod storage;
#[cfg(test)]
mod tests;
pub(crate) mod value;
mod warnings;
mod workload;

use serde_json::Value;

use crate::field::FieldError;
use crate::kinds::Kind;

pub use fields::{field_label_supported, selectable_fields};
pub use metadata::{name_problems, validate_metadata};
pub use prepare::{Context, prepare_create, prepare_update};
pub use scale::{scale_get, scale_set};
pub use service::settle_families;
pub use warnings::warnings;

/// Sets every field that upstream's defaulting sets. Applying it again changes nothing.
pub fn default(kind: &Kind, object: &mut Value) {
    let (group, name) = (kind.group, kind.kind);
    if (group, name) == ("", "Pod") {
        return pod::default_pod(object);
    }
    for family in [
        workload::default,
        service::default,
        cluster::default,
        config::default,
        storage::default,
        policy::default,
    ] {
        family(group, name, object);
    }
}

/// Every mistake in an object about to be created. `object` is defaulted and prepared, and has its name.
pub fn validate_create(kind: &Kind, object: &Value) -> Vec<FieldError> {
    let mut errors = metadata::create(kind, object);
    for family in [
        pod::create,
        workload::create,
        service::create,
        cluster::create,
        config::create,
        storage::create,
        policy::create,
    ] {
        family(kind.group, kind.kind, object, &mut errors);
    }
    errors
}

/// Every mistake in an update from `old` to `new`, written to the object itself or to one of its subresources.
pub fn validate_update(kind: &Kind, subresource: Option<&str>, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = metadata::update(new, old);
    let change = Change { subresource, new, old };
    for family in [
        pod::update,
        workload::update,
        service::update,
        cluster::update,
        config::update,
        storage::update,
        policy::update,
    ] {
        family(kind.group, kind.kind, &change, &mut errors);
    }
    errors
}

/// An update to judge.
struct Change<'a> {
    subresource: Option<&'a str>,
    new: &'a Value,
    old: &'a Value,
}

/// Kinds, as `group/Kind`, whose defaulting or validation is thinner than upstream's; what their schemas and metadata say
/// is enforced. The rest have upstream's rules for the fields that weft acts on.
pub fn partial_kinds() -> &'static [(&'static str, &'static str)] {
    PARTIAL
}

const PARTIAL: &[(&str, &str)] = &[
    ("admissionregistration.k8s.io/MutatingAdmissionPolicy", "expressions are not compiled"),
    ("admissionregistration.k8s.io/MutatingAdmissionPolicyBinding", "metadata only"),
    (
        "admissionregistration.k8s.io/MutatingWebhookConfiguration",
        "names, rules and client configuration; match conditions are not compiled",
    ),
    ("admissionregistration.k8s.io/ValidatingAdmissionPolicy", "expressions are not compiled"),
    ("admissionregistration.k8s.io/ValidatingAdmissionPolicyBinding", "metadata only"),
    (
        "admissionregistration.k8s.io/ValidatingWebhookConfiguration",
        "names, rules and client configuration; match conditions are not compiled",
    ),
    (
        "apiextensions.k8s.io/CustomResourceDefinition",
        "names and versions; structural schemas are not checked",
    ),
    (
        "autoscaling/HorizontalPodAutoscaler",
        "replica bounds, target and metric sources; behavior is not checked",
    ),
    ("batch/CronJob", "no check of the five fields' ranges"),
    ("batch/Job", "no check of pod failure and success policies"),
    ("certificates.k8s.io/CertificateSigningRequest", "the encoded request is not parsed"),
    ("certificates.k8s.io/ClusterTrustBundle", "metadata only"),
    ("certificates.k8s.io/PodCertificateRequest", "metadata only"),
    ("coordination.k8s.io/LeaseCandidate", "metadata only"),
    ("flowcontrol.apiserver.k8s.io/FlowSchema", "metadata only"),
    ("flowcontrol.apiserver.k8s.io/PriorityLevelConfiguration", "metadata only"),
    ("internal.apiserver.k8s.io/StorageVersion", "metadata only"),
    ("PersistentVolume", "sources of drivers other than hostPath, local, nfs and CSI are not checked"),
    (
        "Pod",
        "sources of volume drivers that are gone from the kubelet, dynamic resources and in-place resize rules are not checked",
    ),
    ("resource.k8s.io/*", "metadata only"),
    ("scheduling.k8s.io/PodGroup", "metadata only"),
    ("scheduling.k8s.io/Workload", "metadata only"),
    ("storage.k8s.io/CSIStorageCapacity", "metadata only"),
    ("storage.k8s.io/VolumeAttachment", "immutability only"),
    ("storage.k8s.io/VolumeAttributesClass", "metadata only"),
    ("storagemigration.k8s.io/StorageVersionMigration", "metadata only"),
];

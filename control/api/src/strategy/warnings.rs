//! What is accepted but unwise: the text of `Warning` headers.

use std::collections::BTreeSet;

use serde_json::Value;

use super::value::{entries, items, text};
use crate::kinds::Kind;
use crate::names;

/// Finalizers without a domain that the API itself defines.
const STANDARD_FINALIZERS: [&str; 3] = ["orphan", "foregroundDeletion", "kubernetes"];

/// Warnings for an object that was created or updated.
pub fn warnings(kind: &Kind, object: &Value) -> Vec<String> {
    let mut warnings = finalizers(object);
    match (kind.group, kind.kind) {
        ("", "Pod") => {
            let name = text(&object["metadata"]["name"]);
            if let Some(problem) = names::dns1123_label(name).first() {
                warnings.push(format!(
                    "metadata.name: this is used in the Pod's hostname, which can result in surprising behavior; a DNS label is recommended: [{problem}]"
                ));
            }
            pod_spec(&mut warnings, "spec", &object["spec"]);
        }
        ("apps", _) | ("batch", "Job") => {
            pod_spec(&mut warnings, "spec.template.spec", &object["spec"]["template"]["spec"])
        }
        ("batch", "CronJob") => {
            let spec = &object["spec"]["jobTemplate"]["spec"]["template"]["spec"];
            pod_spec(&mut warnings, "spec.jobTemplate.spec.template.spec", spec);
        }
        ("", "Service") => service(&mut warnings, object),
        ("", "ComponentStatus") => warnings.push("v1 ComponentStatus is deprecated in v1.19+".to_owned()),
        ("", "Endpoints") => {
            warnings.push(
                "v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice".to_owned(),
            );
        }
        _ => {}
    }
    warnings
}

/// Fields of a Service that its type or its lack of an address makes void.
fn service(warnings: &mut Vec<String>, object: &Value) {
    let spec = &object["spec"];
    let (headless, named) = (spec["clusterIP"] == "None", spec["type"] == "ExternalName");
    if object["metadata"]["annotations"]["service.kubernetes.io/topology-aware-hints"].is_string() {
        warnings.push(
            "annotation service.kubernetes.io/topology-aware-hints is deprecated, please use service.kubernetes.io/topology-mode instead"
                .to_owned(),
        );
    }
    if headless {
        if !text(&spec["loadBalancerIP"]).is_empty() {
            warnings.push("spec.loadBalancerIP is ignored when spec.clusterIP is \"None\"".to_owned());
        }
        if !items(&spec["externalIPs"]).is_empty() {
            warnings.push("spec.externalIPs is ignored when spec.clusterIP is \"None\"".to_owned());
        }
        if !matches!(text(&spec["sessionAffinity"]), "" | "None") {
            warnings.push("spec.SessionAffinity is ignored for headless services".to_owned());
        }
    }
    if named && !items(&spec["externalIPs"]).is_empty() {
        warnings.push("spec.externalIPs is ignored when spec.type is \"ExternalName\"".to_owned());
    }
    if !named && !text(&spec["externalName"]).is_empty() {
        warnings.push("spec.externalName is ignored when spec.type is not \"ExternalName\"".to_owned());
    }
    if spec["trafficDistribution"] == "PreferClose" {
        warnings.push(
            "spec.trafficDistribution: PreferClose is deprecated, please use PreferSameZone instead"
                .to_owned(),
        );
    }
}

fn finalizers(object: &Value) -> Vec<String> {
    let bare = items(&object["metadata"]["finalizers"]).iter().map(text);
    bare.filter(|name| !name.contains('/') && !STANDARD_FINALIZERS.contains(name))
        .map(|name| {
            format!(
                "metadata.finalizers: {name:?}: prefer a domain-qualified finalizer name including a path (/) to avoid accidental conflicts with other finalizer writers"
            )
        })
        .collect()
}

fn pod_spec(warnings: &mut Vec<String>, path: &str, spec: &Value) {
    for (key, _) in entries(&spec["nodeSelector"]) {
        for (old, new) in [
            ("beta.kubernetes.io/arch", "kubernetes.io/arch"),
            ("beta.kubernetes.io/os", "kubernetes.io/os"),
            ("failure-domain.beta.kubernetes.io/region", "topology.kubernetes.io/region"),
            ("failure-domain.beta.kubernetes.io/zone", "topology.kubernetes.io/zone"),
            ("beta.kubernetes.io/instance-type", "node.kubernetes.io/instance-type"),
        ] {
            if key == old {
                warnings
                    .push(format!("{path}.nodeSelector[{key}]: deprecated since v1.14; use {new:?} instead"));
            }
        }
    }
    for list in ["initContainers", "containers"] {
        for (index, container) in items(&spec[list]).iter().enumerate() {
            let mut seen = BTreeSet::new();
            for (at, variable) in items(&container["env"]).iter().enumerate() {
                let name = text(&variable["name"]);
                if !seen.insert(name) {
                    warnings.push(format!(
                        "{path}.{list}[{index}].env[{at}]: hides previous definition of {name:?}, which may be dropped when using apply"
                    ));
                }
            }
        }
    }
    let mut seen = BTreeSet::new();
    for (index, secret) in items(&spec["imagePullSecrets"]).iter().enumerate() {
        let name = text(&secret["name"]);
        if !name.is_empty() && !seen.insert(name) {
            warnings.push(format!("{path}.imagePullSecrets[{index}].name: duplicate name {name:?}"));
        }
    }
}

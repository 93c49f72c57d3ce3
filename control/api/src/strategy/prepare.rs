//! What a create or an update may touch, decided before validation.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::pod;
use super::service;
use super::value::{at, copy, default_object, default_to, entries, is_empty, items, remove, same, text};
use crate::kinds::Kind;

/// Who creates the object, and when. Some kinds record it.
#[derive(Clone, Debug)]
pub struct Context<'a> {
    /// The user's name.
    pub username: &'a str,
    /// The user's uid; may be empty.
    pub uid: &'a str,
    /// The user's groups.
    pub groups: &'a [String],
    /// The user's extra attributes, an object of string lists; null if there are none.
    pub extra: &'a Value,
    /// The time of the request.
    pub now: Timestamp,
}

/// Kinds with a generation, and what a change of it means: a change of these fields, or of all but metadata and status
/// when the list is empty.
fn generation_fields(group: &str, kind: &str) -> Option<&'static [&'static str]> {
    match (group, kind) {
        ("", "Pod" | "ReplicationController")
        | ("apps", "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet")
        | ("batch", "Job" | "CronJob")
        | ("networking.k8s.io", "Ingress" | "IngressClass" | "NetworkPolicy")
        | ("policy", "PodDisruptionBudget")
        | ("apiextensions.k8s.io", "CustomResourceDefinition")
        | ("flowcontrol.apiserver.k8s.io", "FlowSchema" | "PriorityLevelConfiguration")
        | ("storage.k8s.io", "CSIDriver")
        | ("resource.k8s.io", "DeviceClass" | "ResourceSlice" | "DeviceTaintRule") => Some(&["spec"]),
        ("discovery.k8s.io", "EndpointSlice") | ("scheduling.k8s.io", "PriorityClass") => Some(&[]),
        (
            "admissionregistration.k8s.io",
            "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration",
        ) => Some(&["webhooks"]),
        ("admissionregistration.k8s.io", _) => Some(&["spec"]),
        _ => None,
    }
}

/// Kinds whose status a client may give with the object itself.
fn keeps_status_on_create(group: &str, kind: &str) -> bool {
    matches!((group, kind), ("", "Node"))
}

/// Brings a new object into the state in which it is stored. Its uid, name and creation time are set already.
pub fn prepare_create(kind: &Kind, object: &mut Value, context: &Context<'_>) {
    let (group, name) = (kind.group, kind.kind);
    if kind.subresource("status").is_some() && !keeps_status_on_create(group, name) {
        reset_status(group, name, object, context);
    }
    if let Some(metadata) = at(object, &["metadata"]) {
        remove(metadata, "deletionTimestamp");
        remove(metadata, "deletionGracePeriodSeconds");
        remove(metadata, "selfLink");
        remove(metadata, "generation");
        if generation_fields(group, name).is_some() {
            metadata["generation"] = 1.into();
        }
    }
    match (group, name) {
        ("", "Pod") => pod::prepare_create(object),
        ("", "Namespace") => namespace_finalizer(object),
        ("", "Secret") => merge_string_data(object),
        ("", "Service") => service::prepare_create(object),
        ("", "PersistentVolumeClaim") => claim_data_source(object),
        ("batch", "Job") => job_selector(object),
        ("certificates.k8s.io", "CertificateSigningRequest") => requestor(object, context),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => new_definition_status(object),
        _ => {}
    }
}

fn reset_status(group: &str, kind: &str, object: &mut Value, context: &Context<'_>) {
    object["status"] = match (group, kind) {
        ("", "Namespace") => json!({"phase": "Active"}),
        ("", "PersistentVolumeClaim") => json!({"phase": "Pending"}),
        ("", "PersistentVolume") => {
            json!({"phase": "Pending", "lastPhaseTransitionTime": seconds(context.now)})
        }
        ("", "Service") | ("networking.k8s.io", "Ingress") => json!({"loadBalancer": {}}),
        ("apps", "StatefulSet") => json!({"replicas": 0}),
        ("apps", "ReplicaSet") | ("", "ReplicationController") => json!({"replicas": 0}),
        ("apps", "DaemonSet") => json!({
            "currentNumberScheduled": 0, "numberMisscheduled": 0, "desiredNumberScheduled": 0, "numberReady": 0,
        }),
        ("policy", "PodDisruptionBudget") => {
            json!({"disruptionsAllowed": 0, "currentHealthy": 0, "desiredHealthy": 0, "expectedPods": 0})
        }
        ("autoscaling", "HorizontalPodAutoscaler") => json!({"desiredReplicas": 0}),
        _ => json!({}),
    };
    if (group, kind) == ("autoscaling", "HorizontalPodAutoscaler")
        && text(&object["apiVersion"]) == "autoscaling/v1"
    {
        object["status"] = json!({"currentReplicas": 0, "desiredReplicas": 0});
    }
}

/// An instant as `metav1.Time` writes it: whole seconds.
fn seconds(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

/// The namespace controller takes this away when the namespace is empty.
fn namespace_finalizer(namespace: &mut Value) {
    let Some(spec) = default_object(namespace, "spec") else { return };
    if !items(&spec["finalizers"]).iter().any(|one| one == "kubernetes") {
        default_to(spec, "finalizers", json!([]));
        if let Some(list) = spec["finalizers"].as_array_mut() {
            list.push("kubernetes".into());
        }
    }
}

/// `stringData` is a way to write `data`: encoded, and stronger.
fn merge_string_data(secret: &mut Value) {
    use base64::Engine as _;
    let Some(Value::Object(plain)) = remove(secret, "stringData") else { return };
    if plain.is_empty() {
        return;
    }
    if let Some(data) = default_object(secret, "data") {
        for (key, value) in plain {
            data[key] = base64::engine::general_purpose::STANDARD.encode(text(&value)).into();
        }
    }
}

/// A Job selects its pods by its own uid, unless its author took charge.
fn job_selector(job: &mut Value) {
    if job["spec"]["manualSelector"] == true {
        return;
    }
    let uid = job["metadata"]["uid"].clone();
    let name = job["metadata"]["name"].clone();
    let Some(template) = at(job, &["spec", "template"]) else { return };
    let Some(labels) =
        default_object(template, "metadata").and_then(|metadata| default_object(metadata, "labels"))
    else {
        return;
    };
    for (key, value) in [("controller-uid", &uid), ("job-name", &name)] {
        labels[key] = value.clone();
        labels[format!("batch.kubernetes.io/{key}")] = value.clone();
    }
    let Some(selector) = at(job, &["spec"]).and_then(|spec| default_object(spec, "selector")) else { return };
    if let Some(labels) = default_object(selector, "matchLabels") {
        labels["batch.kubernetes.io/controller-uid"] = uid;
    }
}

fn requestor(request: &mut Value, context: &Context<'_>) {
    let Some(spec) = at(request, &["spec"]) else { return };
    for (field, value) in [
        ("username", Value::from(context.username)),
        ("uid", context.uid.into()),
        ("groups", json!(context.groups)),
        ("extra", context.extra.clone()),
    ] {
        remove(spec, field);
        if !is_empty(&value) {
            spec[field] = value;
        }
    }
}

fn new_definition_status(definition: &mut Value) {
    definition["status"] = json!({
        "conditions": [], "storedVersions": [], "acceptedNames": {"plural": "", "kind": ""},
    });
    add_stored_version(definition);
}

/// Objects may have been stored in every version that was ever the storage version.
fn add_stored_version(definition: &mut Value) {
    let stored = items(&definition["spec"]["versions"]).iter().find(|version| version["storage"] == true);
    let Some(stored) = stored.map(|version| version["name"].clone()) else { return };
    let Some(status) = default_object(definition, "status") else { return };
    default_to(status, "storedVersions", json!([]));
    if let Some(versions) = status["storedVersions"].as_array_mut()
        && !versions.contains(&stored)
    {
        versions.push(stored);
    }
}

/// `dataSource` and `dataSourceRef` say the same when the source is in the claim's namespace.
fn claim_data_source(claim: &mut Value) {
    let Some(spec) = at(claim, &["spec"]) else { return };
    for (from, to) in [("dataSource", "dataSourceRef"), ("dataSourceRef", "dataSource")] {
        if !spec[from].is_null() && spec[to].is_null() && is_empty(&spec[from]["namespace"]) {
            spec[to] = spec[from].clone();
        }
    }
}

/// Puts back what an update, written to the object or to one of its subresources, may not touch.
pub fn prepare_update(kind: &Kind, subresource: Option<&str>, new: &mut Value, old: &Value) {
    let (group, name) = (kind.group, kind.kind);
    keep_metadata(new, old);
    match subresource {
        None => update_main(kind, new, old),
        Some("status") => update_status(group, name, new, old),
        Some("finalize") => keep_all_but(new, old, &[], &["finalizers"]),
        Some("approval") => update_approval(new, old),
        Some("ephemeralcontainers") => keep_all_but(new, old, &[], &["ephemeralContainers"]),
        Some("resize") => {
            keep_all_but(new, old, &[], &["containers", "initContainers", "resources"]);
            pod::keep_all_but_resources(new, old);
        }
        Some(_) => {}
    }
    // The scheduler's binding is no change of what the author asked for.
    if subresource != Some("binding") {
        bump_generation(group, name, new, old);
    }
}

/// Identity and deletion are the server's: an update that leaves them out keeps them.
fn keep_metadata(new: &mut Value, old: &Value) {
    let Some(metadata) = default_object(new, "metadata") else { return };
    let old = &old["metadata"];
    for field in ["generation", "selfLink"] {
        copy(metadata, old, field);
    }
    for field in ["name", "namespace", "uid", "creationTimestamp"] {
        if is_empty(&metadata[field]) {
            copy(metadata, old, field);
        }
    }
    if !old["deletionTimestamp"].is_null() {
        copy(metadata, old, "deletionTimestamp");
    }
    if metadata["deletionGracePeriodSeconds"].is_null() {
        copy(metadata, old, "deletionGracePeriodSeconds");
    }
}

fn update_main(kind: &Kind, new: &mut Value, old: &Value) {
    if kind.subresource("status").is_some() {
        copy(new, old, "status");
    }
    match (kind.group, kind.kind) {
        ("", "Namespace") => {
            if let Some(spec) = default_object(new, "spec") {
                copy(spec, &old["spec"], "finalizers");
            }
        }
        ("", "Secret") => {
            merge_string_data(new);
            if text(&new["type"]).is_empty() {
                copy(new, old, "type");
            }
        }
        ("", "Service") => service::prepare_update(new, old),
        ("", "PersistentVolumeClaim") => claim_data_source(new),
        ("batch", "Job") => {
            // Clients that apply a manifest know neither the generated selector nor its labels.
            if let Some(spec) = at(new, &["spec"])
                && spec["manualSelector"] != true
                && is_empty(&spec["selector"])
            {
                copy(spec, &old["spec"], "selector");
            }
        }
        ("certificates.k8s.io", "CertificateSigningRequest") => copy(new, old, "spec"),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => add_stored_version(new),
        ("discovery.k8s.io", "EndpointSlice") if is_empty(&new["addressType"]) => {
            copy(new, old, "addressType")
        }
        _ => {}
    }
}

fn update_status(group: &str, kind: &str, new: &mut Value, old: &Value) {
    let fields: Vec<String> = entries(old).chain(entries(new)).map(|(field, _)| field.to_owned()).collect();
    for field in
        fields.iter().filter(|field| !matches!(field.as_str(), "apiVersion" | "kind" | "metadata" | "status"))
    {
        copy(new, old, field);
    }
    let kept: &[&str] = match (group, kind) {
        ("", "Pod") => &["ownerReferences"],
        ("apps", "Deployment") => &["labels"],
        ("apiextensions.k8s.io", "CustomResourceDefinition") | ("networking.k8s.io", "ServiceCIDR") => {
            &["labels", "annotations", "finalizers", "ownerReferences"]
        }
        _ => &[],
    };
    if let Some(metadata) = at(new, &["metadata"]) {
        kept.iter().for_each(|field| copy(metadata, &old["metadata"], field));
    }
    if (group, kind) == ("", "Pod")
        && let Some(status) = default_object(new, "status")
        && is_empty(&status["qosClass"])
    {
        copy(status, &old["status"], "qosClass");
    }
    if (group, kind) == ("certificates.k8s.io", "CertificateSigningRequest") {
        keep_decisions(new, old);
    }
}

/// Status updates may not approve or deny: those conditions stay as they are.
fn keep_decisions(new: &mut Value, old: &Value) {
    let decides = |one: &Value| matches!(text(&one["type"]), "Approved" | "Denied");
    let mut conditions: Vec<Value> =
        items(&old["status"]["conditions"]).iter().filter(|one| decides(one)).cloned().collect();
    conditions.extend(items(&new["status"]["conditions"]).iter().filter(|one| !decides(one)).cloned());
    if let Some(status) = at(new, &["status"]) {
        status["conditions"] = conditions.into();
    }
}

/// Approval touches conditions alone.
fn update_approval(new: &mut Value, old: &Value) {
    let conditions = new["status"]["conditions"].clone();
    let metadata = new["metadata"].clone();
    *new = old.clone();
    new["metadata"] = metadata;
    if let Some(status) = default_object(new, "status") {
        status["conditions"] = conditions;
    }
}

/// Keeps the whole old object but for the named top-level and spec fields, and the metadata.
fn keep_all_but(new: &mut Value, old: &Value, fields: &[&str], spec_fields: &[&str]) {
    let wanted = std::mem::replace(new, old.clone());
    new["metadata"] = wanted["metadata"].clone();
    fields.iter().for_each(|field| copy(new, &wanted, field));
    if let Some(spec) = default_object(new, "spec") {
        spec_fields.iter().for_each(|field| copy(spec, &wanted["spec"], field));
    }
}

fn bump_generation(group: &str, kind: &str, new: &mut Value, old: &Value) {
    let Some(fields) = generation_fields(group, kind) else { return };
    let changed = if fields.is_empty() {
        let rest = |object: &Value| -> Value {
            let rest = entries(object)
                .filter(|(field, _)| !matches!(*field, "apiVersion" | "kind" | "metadata" | "status"));
            rest.map(|(field, value)| (field.to_owned(), value.clone())).collect::<Map<_, _>>().into()
        };
        !same(&rest(new), &rest(old))
    } else {
        fields.iter().any(|field| !same(&new[*field], &old[*field]))
    };
    if changed {
        let generation = old["metadata"]["generation"].as_i64().unwrap_or_default() + 1;
        if let Some(metadata) = at(new, &["metadata"]) {
            metadata["generation"] = generation.into();
        }
    }
}

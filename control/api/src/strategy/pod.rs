//! Pods and pod templates.

mod containers;
mod defaults;
mod environment;
mod placement;
mod probes;
pub(super) mod resources;
mod security;
mod spec;
mod update;
mod volumes;

use serde_json::{Value, json};

use super::Change;
use super::checks::Errors;
use super::metadata;
use super::value::{at, each, is_empty, items};
use crate::field::{FieldError, FieldPath};

pub(super) use defaults::pod as default_pod;
pub(super) use defaults::template as default_template;
pub(super) use placement::node_selector;
pub(super) use volumes::{host_path, nfs};

/// A new pod waits to be scheduled; its quality of service never changes.
pub(super) fn prepare_create(pod: &mut Value) {
    let class = resources::quality_of_service(&pod["spec"]);
    pod["status"] = json!({"phase": "Pending", "qosClass": class});
    let gated = !items(&pod["spec"]["schedulingGates"]).is_empty();
    if gated {
        pod["status"]["conditions"] = json!([{
            "type": "PodScheduled",
            "status": "False",
            "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates",
        }]);
    }
}

/// A resize changes resources and resize policies, nothing else of a container.
pub(super) fn keep_all_but_resources(new: &mut Value, old: &Value) {
    let Some(spec) = at(new, &["spec"]) else { return };
    for list in ["containers", "initContainers"] {
        let before = items(&old["spec"][list]);
        for (container, before) in each(spec, list).zip(before) {
            if container["name"] != before["name"] {
                continue;
            }
            let wanted = std::mem::replace(container, before.clone());
            for field in ["resources", "resizePolicy"] {
                super::value::copy(container, &wanted, field);
            }
        }
    }
}

pub(super) fn create(group: &str, kind: &str, object: &Value, errors: &mut Errors) {
    match (group, kind) {
        ("", "Pod") => {
            let path = FieldPath::new("spec");
            spec::validate(errors, &path, &object["spec"]);
            if !is_empty(&object["spec"]["ephemeralContainers"]) {
                errors.push(FieldError::forbidden(
                    &path.child("ephemeralContainers"),
                    "cannot be set on create",
                ));
            }
            let gated = !items(&object["spec"]["schedulingGates"]).is_empty();
            if gated && !is_empty(&object["spec"]["nodeName"]) {
                let detail = "cannot be set until all schedulingGates have been cleared";
                errors.push(FieldError::forbidden(&path.child("nodeName"), detail));
            }
        }
        ("", "PodTemplate") => template(errors, &FieldPath::new("template"), &object["template"]),
        _ => {}
    }
}

pub(super) fn update(group: &str, kind: &str, change: &Change<'_>, errors: &mut Errors) {
    match (group, kind) {
        ("", "Pod") => update::validate(errors, change),
        ("", "PodTemplate") => template(errors, &FieldPath::new("template"), &change.new["template"]),
        _ => {}
    }
}

/// A template's metadata and spec.
pub(super) fn template(errors: &mut Errors, path: &FieldPath, template: &Value) {
    errors.extend(metadata::validate_metadata(&path.child("metadata"), &template["metadata"]));
    let spec = &template["spec"];
    spec::validate(errors, &path.child("spec"), spec);
    if !is_empty(&spec["ephemeralContainers"]) {
        let detail = "ephemeral containers not allowed in pod template";
        errors.push(FieldError::forbidden(&path.child("spec").child("ephemeralContainers"), detail));
    }
}

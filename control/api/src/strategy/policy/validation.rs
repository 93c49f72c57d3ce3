//! Validation of authorization, admission, certificates and extensions.

use serde_json::Value;

use super::super::Change;
use super::super::checks::{Errors, in_range, label_selector, one_of, optional_one_of, problems, required};
use super::super::value::{is_empty, items, same, text};
use super::RBAC;
use crate::field::{FieldError, FieldPath};
use crate::names;

const ADMISSION: &str = "admissionregistration.k8s.io";
/// Longest that an admission webhook may take.
const WEBHOOK_MAX_SECONDS: i64 = 30;

pub(in super::super) fn create(group: &str, kind: &str, object: &Value, errors: &mut Errors) {
    match (group, kind) {
        (RBAC, "Role" | "ClusterRole") => role(object, kind == "ClusterRole", errors),
        (RBAC, "RoleBinding" | "ClusterRoleBinding") => role_binding(object, kind, errors),
        (ADMISSION, "ValidatingWebhookConfiguration" | "MutatingWebhookConfiguration") => {
            for (index, webhook) in items(&object["webhooks"]).iter().enumerate() {
                webhook_rules(errors, &FieldPath::new("webhooks").index(index), webhook);
            }
        }
        ("apiextensions.k8s.io", "CustomResourceDefinition") => definition(object, errors),
        ("apiregistration.k8s.io", "APIService") => api_service(object, errors),
        ("certificates.k8s.io", "CertificateSigningRequest") => signing_request(object, errors),
        _ => {}
    }
}

pub(in super::super) fn update(group: &str, kind: &str, change: &Change<'_>, errors: &mut Errors) {
    let (new, old) = (change.new, change.old);
    match (group, kind, change.subresource) {
        (RBAC, "RoleBinding" | "ClusterRoleBinding", _) => {
            create(group, kind, new, errors);
            if !same(&new["roleRef"], &old["roleRef"]) {
                errors.push(FieldError::invalid(
                    &FieldPath::new("roleRef"),
                    new["roleRef"].clone(),
                    "cannot change roleRef",
                ));
            }
        }
        ("apiextensions.k8s.io", "CustomResourceDefinition", None) => {
            definition(new, errors);
            let path = FieldPath::new("spec");
            let established = items(&old["status"]["conditions"])
                .iter()
                .any(|one| one["type"] == "Established" && one["status"] == "True");
            if established {
                for field in ["scope", "group"] {
                    super::super::checks::immutable(
                        errors,
                        &path.child(field),
                        &new["spec"][field],
                        &old["spec"][field],
                    );
                }
                for field in ["kind", "plural"] {
                    let (now, before) = (&new["spec"]["names"][field], &old["spec"]["names"][field]);
                    super::super::checks::immutable(errors, &path.child("names").child(field), now, before);
                }
            }
        }
        (_, _, None) => create(group, kind, new, errors),
        _ => {}
    }
}

fn role(object: &Value, cluster: bool, errors: &mut Errors) {
    for (index, rule) in items(&object["rules"]).iter().enumerate() {
        let path = FieldPath::new("rules").index(index);
        if is_empty(&rule["verbs"]) {
            errors.push(FieldError::required(&path.child("verbs"), "verbs must contain at least one value"));
        }
        if !is_empty(&rule["nonResourceURLs"]) {
            if !cluster {
                let detail = "namespaced rules cannot apply to non-resource URLs";
                errors.push(FieldError::invalid(
                    &path.child("nonResourceURLs"),
                    rule["nonResourceURLs"].clone(),
                    detail,
                ));
            }
            if ["apiGroups", "resources", "resourceNames"].iter().any(|field| !is_empty(&rule[*field])) {
                let detail = "rules cannot apply to both regular resources and non-resource URLs";
                errors.push(FieldError::invalid(
                    &path.child("nonResourceURLs"),
                    rule["nonResourceURLs"].clone(),
                    detail,
                ));
            }
            continue;
        }
        if is_empty(&rule["apiGroups"]) {
            let detail = "resource rules must supply at least one api group";
            errors.push(FieldError::required(&path.child("apiGroups"), detail));
        }
        if is_empty(&rule["resources"]) {
            let detail = "resource rules must supply at least one resource";
            errors.push(FieldError::required(&path.child("resources"), detail));
        }
    }
    let selectors = items(&object["aggregationRule"]["clusterRoleSelectors"]);
    if !object["aggregationRule"].is_null() && selectors.is_empty() {
        let path = FieldPath::new("aggregationRule").child("clusterRoleSelectors");
        let detail = "at least one clusterRoleSelector required if aggregationRule is non-nil";
        errors.push(FieldError::required(&path, detail));
    }
    for (index, selector) in selectors.iter().enumerate() {
        let path = FieldPath::new("aggregationRule").child("clusterRoleSelectors").index(index);
        label_selector(errors, &path, selector);
    }
}

fn role_binding(object: &Value, kind: &str, errors: &mut Errors) {
    let path = FieldPath::new("roleRef");
    let role = &object["roleRef"];
    if role["apiGroup"] != RBAC {
        errors.push(FieldError::not_supported(&path.child("apiGroup"), role["apiGroup"].clone(), &[RBAC]));
    }
    let kinds: &[&str] = if kind == "RoleBinding" { &["ClusterRole", "Role"] } else { &["ClusterRole"] };
    if !kinds.contains(&text(&role["kind"])) {
        errors.push(FieldError::not_supported(&path.child("kind"), role["kind"].clone(), kinds));
    }
    if required(errors, &path.child("name"), &role["name"]) {
        let name = text(&role["name"]);
        problems(errors, &path.child("name"), name, names::path_segment(name));
    }
    for (index, subject) in items(&object["subjects"]).iter().enumerate() {
        subject_rules(errors, &FieldPath::new("subjects").index(index), subject, kind == "RoleBinding");
    }
}

fn subject_rules(errors: &mut Errors, path: &FieldPath, subject: &Value, namespaced: bool) {
    required(errors, &path.child("name"), &subject["name"]);
    let group = &subject["apiGroup"];
    match text(&subject["kind"]) {
        "ServiceAccount" => {
            let name = text(&subject["name"]);
            if !name.is_empty() {
                problems(errors, &path.child("name"), name, names::dns1123_subdomain(name));
            }
            if !is_empty(group) {
                errors.push(FieldError::not_supported(&path.child("apiGroup"), group.clone(), &[""]));
            }
            if !namespaced {
                required(errors, &path.child("namespace"), &subject["namespace"]);
            }
        }
        "User" | "Group" => {
            if group != RBAC {
                errors.push(FieldError::not_supported(&path.child("apiGroup"), group.clone(), &[RBAC]));
            }
        }
        _ => {
            let kinds = ["Group", "ServiceAccount", "User"];
            errors.push(FieldError::not_supported(&path.child("kind"), subject["kind"].clone(), &kinds));
        }
    }
}

fn webhook_rules(errors: &mut Errors, path: &FieldPath, webhook: &Value) {
    let name = text(&webhook["name"]);
    problems(errors, &path.child("name"), name, names::dns1123_subdomain(name));
    if name.split('.').count() < 3 && !name.is_empty() {
        let detail = "should be a domain with at least three segments separated by dots";
        errors.push(FieldError::invalid(&path.child("name"), name, detail));
    }
    for (index, rule) in items(&webhook["rules"]).iter().enumerate() {
        let path = path.child("rules").index(index);
        for field in ["operations", "apiGroups", "apiVersions", "resources"] {
            required(errors, &path.child(field), &rule[field]);
        }
    }
    for (field, known) in [("failurePolicy", ["Fail", "Ignore"]), ("matchPolicy", ["Equivalent", "Exact"])] {
        optional_one_of(errors, &path.child(field), &webhook[field], &known);
    }
    optional_one_of(
        errors,
        &path.child("reinvocationPolicy"),
        &webhook["reinvocationPolicy"],
        &["IfNeeded", "Never"],
    );
    let effects = &webhook["sideEffects"];
    if effects.is_null() {
        errors
            .push(FieldError::required(&path.child("sideEffects"), "must specify one of None, NoneOnDryRun"));
    } else {
        optional_one_of(errors, &path.child("sideEffects"), effects, &["None", "NoneOnDryRun"]);
    }
    in_range(errors, &path.child("timeoutSeconds"), &webhook["timeoutSeconds"], 1, WEBHOOK_MAX_SECONDS);
    for selector in ["namespaceSelector", "objectSelector"] {
        label_selector(errors, &path.child(selector), &webhook[selector]);
    }
    required(errors, &path.child("admissionReviewVersions"), &webhook["admissionReviewVersions"]);
    let (client, path) = (&webhook["clientConfig"], path.child("clientConfig"));
    if client["url"].is_null() == client["service"].is_null() {
        errors.push(FieldError::required(&path, "exactly one of url or service is required"));
    }
    if !client["service"].is_null() {
        for field in ["name", "namespace"] {
            required(errors, &path.child("service").child(field), &client["service"][field]);
        }
    }
    if let Some(url) = client["url"].as_str()
        && !url.starts_with("https://")
    {
        let detail = "'https' is the only allowed URL scheme; desired format: https://host[/path]";
        errors.push(FieldError::invalid(&path.child("url"), url, detail));
    }
}

fn definition(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    let names_of = &spec["names"];
    let expected = format!("{}.{}", text(&names_of["plural"]), text(&spec["group"]));
    if object["metadata"]["name"] != expected.as_str() {
        let name = object["metadata"]["name"].clone();
        let detail = "must be spec.names.plural+\".\"+spec.group";
        errors.push(FieldError::invalid(&FieldPath::new("metadata").child("name"), name, detail));
    }
    if required(errors, &path.child("group"), &spec["group"]) {
        let group = text(&spec["group"]);
        problems(errors, &path.child("group"), group, names::dns1123_subdomain(group));
        if !group.contains('.') {
            errors.push(FieldError::invalid(
                &path.child("group"),
                group,
                "should be a domain with at least one dot",
            ));
        }
    }
    one_of(errors, &path.child("scope"), &spec["scope"], &["Cluster", "Namespaced"]);
    for field in ["plural", "singular", "kind", "listKind"] {
        let at = path.child("names").child(field);
        if required(errors, &at, &names_of[field]) {
            let name = text(&names_of[field]).to_lowercase();
            problems(errors, &at, text(&names_of[field]), names::dns1035_label(&name));
        }
    }
    versions(errors, &path.child("versions"), spec);
}

fn versions(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let versions = items(&spec["versions"]);
    let stored = versions.iter().filter(|version| version["storage"] == true).count();
    if stored != 1 {
        let detail = "must have exactly one version marked as storage version";
        errors.push(FieldError::invalid(path, spec["versions"].clone(), detail));
    }
    let mut seen = std::collections::BTreeSet::new();
    for (index, version) in versions.iter().enumerate() {
        let (path, name) = (path.index(index), text(&version["name"]));
        problems(errors, &path.child("name"), name, names::dns1035_label(name));
        if !seen.insert(name) {
            errors.push(FieldError::invalid(
                &path,
                spec["versions"].clone(),
                "must contain unique version names",
            ));
        }
        if version["schema"]["openAPIV3Schema"].is_null() {
            let detail = "schemas are required";
            errors.push(FieldError::required(&path.child("schema").child("openAPIV3Schema"), detail));
        }
    }
}

fn api_service(object: &Value, errors: &mut Errors) {
    let spec = &object["spec"];
    let expected = format!("{}.{}", text(&spec["version"]), text(&spec["group"]));
    let name = text(&object["metadata"]["name"]);
    // The core group has no name: v1.
    if name != expected && !(is_empty(&spec["group"]) && name == format!("{}.", text(&spec["version"]))) {
        let detail = format!("must be `spec.version+\".\"+spec.group`: {expected:?}");
        errors.push(FieldError::invalid(&FieldPath::new("metadata").child("name"), name, detail));
    }
    let path = FieldPath::new("spec");
    required(errors, &path.child("version"), &spec["version"]);
    for field in ["groupPriorityMinimum", "versionPriority"] {
        let max = if field == "versionPriority" { 1000 } else { 20_000 };
        let priority = spec[field].as_i64().unwrap_or_default();
        if priority <= 0 || priority > max {
            let detail = format!("must be positive and less than {max}");
            errors.push(FieldError::invalid(&path.child(field), priority, detail));
        }
    }
    if spec["service"].is_null() {
        if !is_empty(&spec["caBundle"]) {
            errors.push(FieldError::invalid(
                &path.child("caBundle"),
                "<omitted>",
                "local APIServices may not have a caBundle",
            ));
        }
        return;
    }
    for field in ["namespace", "name"] {
        required(errors, &path.child("service").child(field), &spec["service"][field]);
    }
}

fn signing_request(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    if is_empty(&spec["usages"]) {
        errors.push(FieldError::required(&path.child("usages"), ""));
    }
    required(errors, &path.child("request"), &spec["request"]);
    if required(errors, &path.child("signerName"), &spec["signerName"]) {
        let name = text(&spec["signerName"]);
        let well_formed =
            name.split_once('/').is_some_and(|(domain, rest)| domain.contains('.') && !rest.is_empty());
        if !well_formed {
            let detail = "must be a fully qualified domain and path of the form 'example.com/signer-name'";
            errors.push(FieldError::invalid(&path.child("signerName"), name, detail));
        }
    }
    if let Some(seconds) = spec["expirationSeconds"].as_i64().filter(|seconds| *seconds < 600) {
        let detail = "may not specify a duration less than 600 seconds (10 minutes)";
        errors.push(FieldError::invalid(&path.child("expirationSeconds"), seconds, detail));
    }
}

//! Tests of decoding.
use serde_json::json;

use super::*;
use crate::kinds;

fn kind(group: &str, version: &str, kind: &str) -> &'static kinds::Kind {
    kinds::by_gvk(group, version, kind).unwrap()
}

fn pod(body: &str, validation: FieldValidation) -> Result<Decoded, Status> {
    decode(kind("", "v1", "Pod"), "application/json", body.as_bytes(), validation)
}

fn deployment(body: &str) -> Result<Decoded, Status> {
    decode(kind("apps", "v1", "Deployment"), "application/json", body.as_bytes(), FieldValidation::Strict)
}

fn message(result: Result<Decoded, Status>) -> String {
    let status = result.unwrap_err();
    assert_eq!((status.code(), status.reason.as_ref()), (400, "BadRequest"));
    status.message
}

#[test]
fn reads_and_canonicalises() {
    let body = r#"{"metadata":{"name":"a","creationTimestamp":null,"labels":{"x":null}},
        "spec":{"containers":[{"name":"c","resources":{"limits":{"cpu":0.5,"memory":"1024Mi"}},
        "ports":[{"containerPort":80}],"livenessProbe":{"httpGet":{"port":"http"}}}]},
        "status":{"startTime":"2024-01-01T02:00:00.5+02:00"}}"#;
    let decoded = pod(body, FieldValidation::Strict).unwrap();
    assert_eq!(
        decoded.object,
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": {"x": ""}},
            "spec": {"containers": [{"name": "c", "resources": {"limits": {"cpu": "500m", "memory": "1Gi"}},
            "ports": [{"containerPort": 80}], "livenessProbe": {"httpGet": {"port": "http"}}}]},
            "status": {"startTime": "2024-01-01T00:00:00Z"}})
    );
    assert!(decoded.warnings.is_empty());
}

#[test]
fn a_condition_always_has_a_time() {
    let body = r#"{"status":{"conditions":[{"type":"A","lastTransitionTime":null},{"type":"B"},
        {"type":"C","lastTransitionTime":"2024-01-01T00:00:00Z"}]}}"#;
    let service = kind("", "v1", "Service");
    let decoded = decode(service, "application/json", body.as_bytes(), FieldValidation::Strict).unwrap();
    let times: Vec<_> = decoded.object["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|condition| &condition["lastTransitionTime"])
        .collect();
    assert_eq!(times, ["0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "2024-01-01T00:00:00Z"]);
}

#[test]
fn unknown_and_duplicate_fields() {
    let body = r#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":"a","name":"b","labels":{"l":"1","l":"2"}},
        "spec":{"containers":[{"name":"x"},{"nam":{"deep":1}}],"foo":1}}"#;
    let expected = [
        r#"duplicate field "metadata.name""#,
        r#"duplicate field "metadata.labels.l""#,
        r#"unknown field "spec.containers[1].nam""#,
        r#"unknown field "spec.foo""#,
    ];
    let warned = pod(body, FieldValidation::Warn).unwrap();
    assert_eq!(warned.warnings, expected);
    assert_eq!(warned.object["metadata"], json!({"name": "b", "labels": {"l": "2"}}));
    assert_eq!(warned.object["spec"], json!({"containers": [{"name": "x"}, {}]}));
    assert!(pod(body, FieldValidation::Ignore).unwrap().warnings.is_empty());
    assert_eq!(
        message(pod(body, FieldValidation::Strict)),
        format!(
            r#"Pod in version "v1" cannot be handled as a Pod: strict decoding error: {}"#,
            expected.join(", ")
        )
    );
}

#[test]
fn wrong_types() {
    let prefix = r#"Deployment in version "v1" cannot be handled as a Deployment: "#;
    for (body, expected) in [
        (
            r#"{"spec":{"replicas":"3"}}"#,
            "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            r#"{"spec":{"replicas":1.5}}"#,
            "json: cannot unmarshal number 1.5 into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            r#"{"spec":{"replicas":3000000000}}"#,
            "json: cannot unmarshal number 3000000000 into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            r#"{"spec":{"template":{"spec":{"containers":[{"env":[{"value":1}]}]}}}}"#,
            "json: cannot unmarshal number into Go struct field EnvVar.spec.template.spec.containers.env.value of type string",
        ),
        (
            r#"{"metadata":{"labels":{"a":true}}}"#,
            "json: cannot unmarshal bool into Go struct field ObjectMeta.metadata.labels of type string",
        ),
        (
            r#"{"spec":[]}"#,
            "json: cannot unmarshal array into Go struct field Deployment.spec of type v1.DeploymentSpec",
        ),
        (
            r#"{"spec":{"template":{"spec":{"containers":{}}}}}"#,
            "json: cannot unmarshal object into Go struct field PodSpec.spec.template.spec.containers of type []v1.Container",
        ),
        (
            r#"{"metadata":{"creationTimestamp":"soon"}}"#,
            r#"parsing time "soon" as "2006-01-02T15:04:05Z07:00": cannot parse "soon" as "2006""#,
        ),
        (
            r#"{"spec":{"template":{"spec":{"containers":[{"resources":{"limits":{"cpu":"x"}}}]}}}}"#,
            "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
        ),
    ] {
        assert_eq!(message(deployment(body)), format!("{prefix}{expected}"), "{body}");
    }
    let secret = kind("", "v1", "Secret");
    let body = br#"{"data":{"a":"?"}}"#;
    let status = decode(secret, "application/json", body, FieldValidation::Strict).unwrap_err();
    assert!(status.message.ends_with(": illegal base64 data at input byte 0"), "{status}");
}

#[test]
fn broken_bodies() {
    let prefix = "the object provided is unrecognized (must be of type Pod): couldn't get version/kind; json parse error: ";
    for (body, expected) in [
        ("", "unexpected end of JSON input (<empty>)"),
        ("{", "unexpected end of JSON input ({)"),
        ("x", "invalid character 'x' looking for beginning of value (78)"),
        ("{x", "invalid character 'x' looking for beginning of object key string ({x)"),
        (r#"{"a" 1}"#, r#"invalid character '1' after object key ({"a" 1})"#),
        (r#"{"a":1 "b"}"#, r#"invalid character '"' after object key:value pair ({"a":1 "b"})"#),
        ("{\"a\":[1 2]}", "invalid character '2' after array element ({\"a\":[1 2]})"),
        (r#"{"a":tru}"#, r#"invalid character '}' in literal true (expecting 'e') ({"a":tru})"#),
        (r#"{"a":01}"#, r#"invalid character '1' after object key:value pair ({"a":01})"#),
        (r#"{"a":1.}"#, r#"invalid character '}' after decimal point in numeric literal ({"a":1.})"#),
        ("{} {}", "invalid character '{' after top-level value ({} {})"),
        (
            r#"{"spec":{"containers":1}, "metadata":{"name":"broken"}"#,
            r#"unexpected end of JSON input ({"spec":{"containers":1}, "met ...)"#,
        ),
        (
            r#"{"apiVersion":1}"#,
            r#"json: cannot unmarshal number into Go struct field .apiVersion of type string ({"apiVersion":1})"#,
        ),
    ] {
        assert_eq!(message(pod(body, FieldValidation::Strict)), format!("{prefix}{expected}"), "{body}");
    }
    assert!(
        message(pod("[]", FieldValidation::Strict))
            .contains("cannot unmarshal array into Go value of type struct")
    );
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let body = format!(r#"{{"apiVersion":"apps/v1","kind":"ControllerRevision","data":{deep}}}"#);
    let revision = kind("apps", "v1", "ControllerRevision");
    message(decode(revision, "application/json", body.as_bytes(), FieldValidation::Ignore));
}

#[test]
fn types_that_differ() {
    let body = r#"{"apiVersion":"v1","kind":"Service","spec":{"ports":[]}}"#;
    assert_eq!(
        message(pod(body, FieldValidation::Strict)),
        r#"Service in version "v1" cannot be handled as a Pod: converting (v1.Service) to (core.Pod): unknown conversion"#
    );
    let body = r#"{"apiVersion":"v1","kind":"Widget"}"#;
    assert_eq!(
        message(pod(body, FieldValidation::Strict)),
        r#"Widget in version "v1" cannot be handled as a Pod: no kind "Widget" is registered for version "v1" in scheme "weft""#
    );
    let scaler = kind("autoscaling", "v2", "HorizontalPodAutoscaler");
    let body = br#"{"apiVersion":"autoscaling/v1","kind":"HorizontalPodAutoscaler"}"#;
    assert_eq!(
        message(decode(scaler, "application/json", body, FieldValidation::Strict)),
        "the API version in the data (autoscaling/v1) does not match the expected API version (autoscaling/v2)"
    );
    let status = decode(scaler, "text/plain", body, FieldValidation::Strict).unwrap_err();
    assert_eq!((status.code(), status.reason.as_ref()), (415, "UnsupportedMediaType"));
}

#[test]
fn other_bodies_than_kinds() {
    let scale = kind("apps", "v1", "Deployment").subresource("scale").unwrap();
    let body = br#"{"spec":{"replicas":3}}"#;
    let decoded = decode(scale, "application/json", body, FieldValidation::Strict).unwrap();
    assert_eq!(decoded.object["apiVersion"], "autoscaling/v1");
    for api_version in ["v1", "apps/v1", "policy/v1"] {
        let body =
            format!(r#"{{"kind":"DeleteOptions","apiVersion":"{api_version}","gracePeriodSeconds":0}}"#);
        let options = Gvk { group: "apps", version: "v1", kind: "DeleteOptions" };
        let decoded = decode(&options, "application/json", body.as_bytes(), FieldValidation::Strict).unwrap();
        assert_eq!(decoded.object["gracePeriodSeconds"], 0);
    }
}

#[test]
fn yaml_bodies() {
    let service = kind("", "v1", "Service");
    let read = |body: &str, validation| decode(service, "application/yaml", body.as_bytes(), validation);
    let body = "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  ports:\n  - port: 80\n    targetPort: http\n  foo: bar\n  type: A\n  type: B\n";
    let decoded = read(body, FieldValidation::Warn).unwrap();
    assert_eq!(decoded.object["spec"], json!({"ports": [{"port": 80, "targetPort": "http"}], "type": "B"}));
    assert_eq!(decoded.warnings, [r#"unknown field "spec.foo""#, r#"duplicate field "spec.type""#]);
    assert!(message(read("spec:\n  clusterIP: 12\n", FieldValidation::Warn)).ends_with(
        "json: cannot unmarshal number into Go struct field ServiceSpec.spec.clusterIP of type string"
    ));
    let broken = message(read("a: [1\nb: 2", FieldValidation::Warn));
    let prefix = "the object provided is unrecognized (must be of type Service): error converting YAML to JSON: yaml: ";
    assert!(broken.starts_with(prefix) && !broken.contains('\n'), "{broken}");
    assert!(message(read("---\na: 1\n---\nb: 1\n", FieldValidation::Warn)).starts_with(prefix));
}

#[test]
fn schemas_of_custom_resources() {
    let body = br#"{"spec":{"versions":[{"schema":{"openAPIV3Schema":{"type":"object","properties":{"a":{"type":"array",
        "items":{"type":"string","bogus":1},"default":{"any":[1]}}},"additionalProperties":false}}}]}}"#;
    let crd = kind("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
    let decoded = decode(crd, "application/json", body, FieldValidation::Warn).unwrap();
    let path = "spec.versions[0].schema.openAPIV3Schema.properties.a.items.bogus";
    assert_eq!(decoded.warnings, [format!("unknown field {path:?}")]);
    let schema = &decoded.object["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(
        schema["properties"]["a"],
        json!({"type": "array", "items": {"type": "string"}, "default": {"any": [1]}})
    );
}

#[test]
fn patched_values() {
    let value = json!({"apiVersion": "v1", "kind": "Pod", "spec": {"hostNetwork": null, "x": 1}});
    let decoded = decode_value(kind("", "v1", "Pod"), value, FieldValidation::Warn).unwrap();
    assert_eq!(decoded.object["spec"], json!({}));
    assert_eq!(decoded.warnings, [r#"unknown field "spec.x""#]);
    assert!(
        message(decode_value(kind("", "v1", "Pod"), json!({"spec": 1}), FieldValidation::Warn))
            .contains("PodSpec")
    );
}

//! The columns of every kind, as data.

use super::Column;

const fn column(name: &'static str, type_: &'static str, priority: i32) -> Column {
    Column { name, type_, format: "", priority }
}

const fn text(name: &'static str) -> Column {
    column(name, "string", 0)
}

const fn int(name: &'static str) -> Column {
    column(name, "integer", 0)
}

const fn boolean(name: &'static str) -> Column {
    column(name, "boolean", 0)
}

const fn wide(name: &'static str) -> Column {
    column(name, "string", 1)
}

const NAME: Column = Column { name: "Name", type_: "string", format: "name", priority: 0 };
const AGE: Column = text("Age");
const CONTAINERS: Column = wide("Containers");
const IMAGES: Column = wide("Images");
const SELECTOR: Column = wide("Selector");

const DEFAULT: &[Column] = &[NAME, column("Created At", "date", 0)];

const POD: &[Column] = &[
    NAME,
    text("Ready"),
    text("Status"),
    text("Restarts"),
    AGE,
    wide("IP"),
    wide("Node"),
    wide("Nominated Node"),
    wide("Readiness Gates"),
];
const POD_TEMPLATE: &[Column] = &[NAME, text("Containers"), text("Images"), text("Pod Labels")];
const REPLICAS: &[Column] =
    &[NAME, int("Desired"), int("Current"), int("Ready"), AGE, CONTAINERS, IMAGES, SELECTOR];
const DEPLOYMENT: &[Column] =
    &[NAME, text("Ready"), text("Up-to-date"), text("Available"), AGE, CONTAINERS, IMAGES, SELECTOR];
const DAEMON_SET: &[Column] = &[
    NAME,
    int("Desired"),
    int("Current"),
    int("Ready"),
    int("Up-to-date"),
    int("Available"),
    text("Node Selector"),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];
const STATEFUL_SET: &[Column] = &[NAME, text("Ready"), AGE, CONTAINERS, IMAGES];
const JOB: &[Column] =
    &[NAME, text("Status"), text("Completions"), text("Duration"), AGE, CONTAINERS, IMAGES, SELECTOR];
const CRON_JOB: &[Column] = &[
    NAME,
    text("Schedule"),
    text("Timezone"),
    boolean("Suspend"),
    int("Active"),
    text("Last Schedule"),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];
const CONTROLLER_REVISION: &[Column] = &[NAME, text("Controller"), text("Revision"), AGE];
const HPA: &[Column] =
    &[NAME, text("Reference"), text("Targets"), text("MinPods"), text("MaxPods"), text("Replicas"), AGE];
const PDB: &[Column] =
    &[NAME, text("Min Available"), text("Max Unavailable"), int("Allowed Disruptions"), AGE];
const SCALE: &[Column] = &[text("Name"), int("Desired"), int("Available"), AGE];

const SERVICE: &[Column] =
    &[NAME, text("Type"), text("Cluster-IP"), text("External-IP"), text("Port(s)"), AGE, SELECTOR];
const INGRESS: &[Column] = &[NAME, text("Class"), text("Hosts"), text("Address"), text("Ports"), AGE];
const INGRESS_CLASS: &[Column] = &[NAME, text("Controller"), text("Parameters"), AGE];
const ENDPOINTS: &[Column] = &[NAME, text("Endpoints"), AGE];
const ENDPOINT_SLICE: &[Column] = &[NAME, text("AddressType"), text("Ports"), text("Endpoints"), AGE];
const NETWORK_POLICY: &[Column] = &[NAME, text("Pod-Selector"), AGE];
const SERVICE_CIDR: &[Column] = &[NAME, text("CIDRs"), AGE];
const IP_ADDRESS: &[Column] = &[NAME, text("ParentRef")];

const NODE: &[Column] = &[
    NAME,
    text("Status"),
    text("Roles"),
    AGE,
    text("Version"),
    wide("Internal-IP"),
    wide("External-IP"),
    wide("OS-Image"),
    wide("Kernel-Version"),
    wide("Container-Runtime"),
];
const EVENT: &[Column] = &[
    text("Last Seen"),
    text("Type"),
    text("Reason"),
    text("Object"),
    wide("Subobject"),
    wide("Source"),
    text("Message"),
    wide("First Seen"),
    wide("Count"),
    Column { name: "Name", type_: "string", format: "name", priority: 1 },
];
const NAMESPACE: &[Column] = &[NAME, text("Status"), AGE];
const COMPONENT_STATUS: &[Column] = &[NAME, text("Status"), text("Message"), text("Error")];
const RESOURCE_QUOTA: &[Column] = &[NAME, text("Request"), text("Limit"), AGE];
const PRIORITY_CLASS: &[Column] =
    &[NAME, int("Value"), boolean("Global-Default"), AGE, text("PreemptionPolicy")];
const RUNTIME_CLASS: &[Column] = &[NAME, text("Handler"), AGE];
const LEASE: &[Column] = &[NAME, text("Holder"), AGE];
const LEASE_CANDIDATE: &[Column] =
    &[NAME, text("LeaseName"), text("BinaryVersion"), text("EmulationVersion"), AGE];
const API_SERVICE: &[Column] = &[NAME, text("Service"), text("Available"), AGE];

const SECRET: &[Column] = &[NAME, text("Type"), text("Data"), AGE];
const SERVICE_ACCOUNT: &[Column] = &[NAME, text("Secrets"), AGE];
const CONFIG_MAP: &[Column] = &[NAME, text("Data"), AGE];

const PERSISTENT_VOLUME: &[Column] = &[
    NAME,
    text("Capacity"),
    text("Access Modes"),
    text("Reclaim Policy"),
    text("Status"),
    text("Claim"),
    text("StorageClass"),
    text("VolumeAttributesClass"),
    text("Reason"),
    AGE,
    wide("VolumeMode"),
];
const PERSISTENT_VOLUME_CLAIM: &[Column] = &[
    NAME,
    text("Status"),
    text("Volume"),
    text("Capacity"),
    text("Access Modes"),
    text("StorageClass"),
    text("VolumeAttributesClass"),
    AGE,
    wide("VolumeMode"),
];
const STORAGE_CLASS: &[Column] = &[
    NAME,
    text("Provisioner"),
    text("ReclaimPolicy"),
    text("VolumeBindingMode"),
    text("AllowVolumeExpansion"),
    AGE,
];
const VOLUME_ATTRIBUTES_CLASS: &[Column] = &[NAME, text("DriverName"), AGE];
const VOLUME_ATTACHMENT: &[Column] = &[
    NAME,
    Column { name: "Attacher", type_: "string", format: "name", priority: 0 },
    text("PV"),
    text("Node"),
    boolean("Attached"),
    AGE,
];
const CSI_NODE: &[Column] = &[NAME, int("Drivers"), AGE];
const CSI_DRIVER: &[Column] = &[
    NAME,
    boolean("AttachRequired"),
    boolean("PodInfoOnMount"),
    boolean("StorageCapacity"),
    text("TokenRequests"),
    boolean("RequiresRepublish"),
    text("Modes"),
    AGE,
];
const CSI_STORAGE_CAPACITY: &[Column] = &[NAME, text("StorageClassName"), text("Capacity")];
const STORAGE_VERSION: &[Column] = &[NAME, text("CommonEncodingVersion"), text("StorageVersions"), AGE];
const STORAGE_VERSION_MIGRATION: &[Column] = &[text("Name"), text("Resource")];

const ROLE_BINDING: &[Column] =
    &[NAME, text("Role"), AGE, wide("Users"), wide("Groups"), wide("ServiceAccounts")];
const CSR: &[Column] =
    &[NAME, AGE, text("SignerName"), text("Requestor"), text("RequestedDuration"), text("Condition")];
const CLUSTER_TRUST_BUNDLE: &[Column] = &[NAME, text("SignerName")];
const WEBHOOKS: &[Column] = &[NAME, int("Webhooks"), AGE];
const VALIDATING_POLICY: &[Column] = &[NAME, int("Validations"), text("ParamKind"), AGE];
const MUTATING_POLICY: &[Column] = &[NAME, int("Mutations"), text("ParamKind"), AGE];
const POLICY_BINDING: &[Column] = &[NAME, text("PolicyName"), text("ParamRef"), AGE];
const FLOW_SCHEMA: &[Column] = &[
    NAME,
    text("PriorityLevel"),
    text("MatchingPrecedence"),
    text("DistinguisherMethod"),
    AGE,
    text("MissingPL"),
];
const PRIORITY_LEVEL: &[Column] = &[
    NAME,
    text("Type"),
    text("NominalConcurrencyShares"),
    text("Queues"),
    text("HandSize"),
    text("QueueLengthLimit"),
    AGE,
];
const NAME_AND_AGE: &[Column] = &[NAME, AGE];
const RESOURCE_CLAIM: &[Column] = &[NAME, text("State"), AGE];
const RESOURCE_SLICE: &[Column] = &[NAME, text("Node"), text("Driver"), text("Pool"), AGE];

/// The columns of a kind; name and creation time for kinds without columns of their own.
pub(super) fn of(group: &str, kind: &str) -> &'static [Column] {
    match group {
        "" => core(kind),
        "apps" => match kind {
            "Deployment" => DEPLOYMENT,
            "ReplicaSet" => REPLICAS,
            "StatefulSet" => STATEFUL_SET,
            "DaemonSet" => DAEMON_SET,
            "ControllerRevision" => CONTROLLER_REVISION,
            _ => DEFAULT,
        },
        "discovery.k8s.io" | "networking.k8s.io" => match kind {
            "EndpointSlice" => ENDPOINT_SLICE,
            "Ingress" => INGRESS,
            "IngressClass" => INGRESS_CLASS,
            "NetworkPolicy" => NETWORK_POLICY,
            "ServiceCIDR" => SERVICE_CIDR,
            "IPAddress" => IP_ADDRESS,
            _ => DEFAULT,
        },
        "storage.k8s.io" => storage(kind),
        _ => other(group, kind),
    }
}

fn core(kind: &str) -> &'static [Column] {
    match kind {
        "Pod" => POD,
        "PodTemplate" => POD_TEMPLATE,
        "ReplicationController" => REPLICAS,
        "Service" => SERVICE,
        "Endpoints" => ENDPOINTS,
        "Node" => NODE,
        "Event" => EVENT,
        "Namespace" => NAMESPACE,
        "Secret" => SECRET,
        "ServiceAccount" => SERVICE_ACCOUNT,
        "ConfigMap" => CONFIG_MAP,
        "PersistentVolume" => PERSISTENT_VOLUME,
        "PersistentVolumeClaim" => PERSISTENT_VOLUME_CLAIM,
        "ComponentStatus" => COMPONENT_STATUS,
        "ResourceQuota" => RESOURCE_QUOTA,
        _ => DEFAULT,
    }
}

fn storage(kind: &str) -> &'static [Column] {
    match kind {
        "StorageClass" => STORAGE_CLASS,
        "VolumeAttributesClass" => VOLUME_ATTRIBUTES_CLASS,
        "VolumeAttachment" => VOLUME_ATTACHMENT,
        "CSINode" => CSI_NODE,
        "CSIDriver" => CSI_DRIVER,
        "CSIStorageCapacity" => CSI_STORAGE_CAPACITY,
        _ => DEFAULT,
    }
}

fn other(group: &str, kind: &str) -> &'static [Column] {
    match (group, kind) {
        ("batch", "Job") => JOB,
        ("batch", "CronJob") => CRON_JOB,
        ("events.k8s.io", "Event") => EVENT,
        ("autoscaling", "HorizontalPodAutoscaler") => HPA,
        ("autoscaling", "Scale") => SCALE,
        ("policy", "PodDisruptionBudget") => PDB,
        ("coordination.k8s.io", "Lease") => LEASE,
        ("coordination.k8s.io", "LeaseCandidate") => LEASE_CANDIDATE,
        ("node.k8s.io", "RuntimeClass") => RUNTIME_CLASS,
        ("scheduling.k8s.io", "PriorityClass") => PRIORITY_CLASS,
        ("apiregistration.k8s.io", "APIService") => API_SERVICE,
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => ROLE_BINDING,
        ("certificates.k8s.io", "CertificateSigningRequest") => CSR,
        ("certificates.k8s.io", "ClusterTrustBundle") => CLUSTER_TRUST_BUNDLE,
        (
            "admissionregistration.k8s.io",
            "ValidatingWebhookConfiguration" | "MutatingWebhookConfiguration",
        ) => WEBHOOKS,
        ("admissionregistration.k8s.io", "ValidatingAdmissionPolicy") => VALIDATING_POLICY,
        ("admissionregistration.k8s.io", "MutatingAdmissionPolicy") => MUTATING_POLICY,
        (
            "admissionregistration.k8s.io",
            "ValidatingAdmissionPolicyBinding" | "MutatingAdmissionPolicyBinding",
        ) => POLICY_BINDING,
        ("flowcontrol.apiserver.k8s.io", "FlowSchema") => FLOW_SCHEMA,
        ("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration") => PRIORITY_LEVEL,
        ("resource.k8s.io", "DeviceClass" | "ResourceClaimTemplate") => NAME_AND_AGE,
        ("resource.k8s.io", "ResourceClaim") => RESOURCE_CLAIM,
        ("resource.k8s.io", "ResourceSlice") => RESOURCE_SLICE,
        ("internal.apiserver.k8s.io", "StorageVersion") => STORAGE_VERSION,
        ("storagemigration.k8s.io", "StorageVersionMigration") => STORAGE_VERSION_MIGRATION,
        _ => DEFAULT,
    }
}

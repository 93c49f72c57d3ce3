//! What the machine is: read once at the start.

use std::collections::BTreeMap;
use std::fs;

use k8s_openapi::api::core::v1::NodeSystemInfo;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::config::Config;

/// Version that the kubelet reports: of the API that it speaks.
pub(crate) const KUBELET_VERSION: &str = "v1.36.2+weft";
const RUNTIME_VERSION: &str = concat!("weft://", env!("CARGO_PKG_VERSION"));
const DEFAULT_PODS: u32 = 110;

/// Capacity and identity of the machine.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) memory_bytes: u64,
    cpu_milli: u64,
    ephemeral_bytes: u64,
    pods: u32,
    pub(crate) info: NodeSystemInfo,
}

fn first_line(path: &str) -> String {
    // A file that a machine does not have leaves the field empty, as upstream does.
    fs::read_to_string(path).unwrap_or_default().lines().next().unwrap_or_default().trim().to_owned()
}

fn memory_bytes() -> u64 {
    let table = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = table.lines().find_map(|l| l.strip_prefix("MemTotal:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn os_image() -> String {
    let table = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = table.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="));
    name.map_or_else(|| "Linux".to_owned(), |n| n.trim_matches('"').to_owned())
}

fn arch() -> String {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
    .to_owned()
}

impl Machine {
    pub(crate) fn read(config: &Config) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let disk = nix::sys::statvfs::statvfs(&config.data_dir).map_or(0, |s| s.blocks() * s.fragment_size());
        let over = &config.capacity;
        Self {
            memory_bytes: over.memory_bytes.unwrap_or_else(memory_bytes),
            cpu_milli: over.cpu_milli.unwrap_or(cpus as u64 * 1000),
            ephemeral_bytes: over.ephemeral_storage_bytes.unwrap_or(disk),
            pods: over.pods.unwrap_or(DEFAULT_PODS),
            info: NodeSystemInfo {
                architecture: arch(),
                boot_id: first_line("/proc/sys/kernel/random/boot_id"),
                container_runtime_version: RUNTIME_VERSION.to_owned(),
                kernel_version: first_line("/proc/sys/kernel/osrelease"),
                kube_proxy_version: String::new(),
                kubelet_version: KUBELET_VERSION.to_owned(),
                machine_id: first_line("/etc/machine-id"),
                operating_system: "linux".to_owned(),
                os_image: os_image(),
                swap: None,
                system_uuid: first_line("/sys/class/dmi/id/product_uuid"),
            },
        }
    }

    /// As the Node reports it; all of it is allocatable.
    pub(crate) fn capacity(&self) -> BTreeMap<String, Quantity> {
        let cpu = if self.cpu_milli.is_multiple_of(1000) {
            (self.cpu_milli / 1000).to_string()
        } else {
            format!("{}m", self.cpu_milli)
        };
        let list = [
            ("cpu", cpu),
            ("memory", format!("{}Ki", self.memory_bytes / 1024)),
            ("ephemeral-storage", format!("{}Ki", self.ephemeral_bytes / 1024)),
            ("pods", self.pods.to_string()),
            ("hugepages-1Gi", "0".to_owned()),
            ("hugepages-2Mi", "0".to_owned()),
        ];
        list.into_iter().map(|(name, text)| (name.to_owned(), Quantity(text))).collect()
    }

    /// `cpu` in thousandths, the others in units.
    pub(crate) fn allocatable(&self) -> BTreeMap<String, i64> {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        BTreeMap::from([
            ("cpu".to_owned(), number(self.cpu_milli)),
            ("memory".to_owned(), number(self.memory_bytes)),
            ("ephemeral-storage".to_owned(), number(self.ephemeral_bytes)),
            ("pods".to_owned(), i64::from(self.pods)),
        ])
    }

    /// The well-known labels and the configured ones.
    pub(crate) fn labels(&self, config: &Config) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::from([
            ("kubernetes.io/hostname".to_owned(), config.node_name.clone()),
            ("kubernetes.io/os".to_owned(), "linux".to_owned()),
            ("kubernetes.io/arch".to_owned(), self.info.architecture.clone()),
            ("beta.kubernetes.io/os".to_owned(), "linux".to_owned()),
            ("beta.kubernetes.io/arch".to_owned(), self.info.architecture.clone()),
        ]);
        labels.extend(config.labels.clone());
        labels
    }
}

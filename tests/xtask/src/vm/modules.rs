//! Which of the kernel's modules must be loaded before which.

use std::collections::HashMap;

use anyhow::Context as _;

/// The files of the modules named, each behind those it needs. `dependencies` is `modules.dep`, as depmod writes it; names are taken with `-` and `_`
/// alike.
pub(super) fn in_order(dependencies: &str, names: &[&str]) -> anyhow::Result<Vec<String>> {
    let lines = dependencies.lines().filter_map(|line| line.split_once(':'));
    let needs: HashMap<String, (&str, &str)> =
        lines.map(|(file, needs)| (name(file), (file, needs))).collect();
    let mut order = Vec::new();
    for wanted in names {
        let (file, needed) =
            needs.get(&name(wanted)).with_context(|| format!("the kernel has no module {wanted}"))?;
        // depmod names everything that a module needs, directly or not, the deepest last.
        for file in needed.split_whitespace().rev().chain([*file]) {
            if !order.iter().any(|known| known == file) {
                order.push(file.to_owned());
            }
        }
    }
    Ok(order)
}

fn name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.strip_suffix(".ko").unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/fscache/fscache.ko kernel/fs/netfs/netfs.ko\n\
        kernel/net/9p/9pnet_virtio.ko: kernel/drivers/virtio/virtio_ring.ko kernel/net/9p/9pnet.ko\n\
        kernel/net/9p/9pnet.ko:\n\
        kernel/drivers/crc32c-intel.ko:\n";

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let order = in_order(DEPENDENCIES, &["9p", "9pnet-virtio", "crc32c_intel"]).unwrap();
        let files: Vec<&str> = order.iter().map(|file| file.rsplit('/').next().unwrap()).collect();
        let wanted = [
            "netfs.ko",
            "fscache.ko",
            "9pnet.ko",
            "9p.ko",
            "virtio_ring.ko",
            "9pnet_virtio.ko",
            "crc32c-intel.ko",
        ];
        assert_eq!(files, wanted);
    }

    #[test]
    fn a_module_that_is_not_there_is_named() {
        let missing = in_order(DEPENDENCIES, &["sctp"]).unwrap_err();
        assert_eq!(missing.to_string(), "the kernel has no module sctp");
    }
}

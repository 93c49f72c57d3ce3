//! `weft image`: the images of every node of the cluster.

use anyhow::Context as _;
use weft_agent_runtime::Image;
use weft_agent_runtime::images::ImageStore;

use crate::cli::ImageCommand;
use crate::cluster::Cluster;
use crate::paths::Paths;

/// Runs one of the commands on all nodes.
#[expect(clippy::print_stdout, reason = "this is the command's output")]
pub(crate) fn run(paths: &Paths, command: &ImageCommand) -> anyhow::Result<()> {
    let stores = stores(paths)?;
    match command {
        ImageCommand::Import { archive } => {
            let mut imported = Vec::new();
            for (node, store) in &stores {
                let images = store.import(archive);
                imported =
                    images.with_context(|| format!("cannot import {} into {node}", archive.display()))?;
            }
            for image in imported {
                println!("imported {} ({})", image.tags.join(", "), image.id);
            }
        }
        ImageCommand::Ls => {
            let mut rows = Vec::new();
            for (node, store) in &stores {
                rows.extend(store.list()?.into_iter().map(|image| (node, image)));
            }
            print!("{}", table(&rows));
        }
        ImageCommand::Rm { image } => {
            for (node, store) in &stores {
                store.remove(image).with_context(|| format!("cannot remove {image} from {node}"))?;
            }
        }
    }
    Ok(())
}

fn stores(paths: &Paths) -> anyhow::Result<Vec<(String, ImageStore)>> {
    let cluster = Cluster::read(&paths.cluster_file())?.with_context(|| {
        format!("there is no cluster in {}; start one with `weft up`", paths.data.display())
    })?;
    let open = |name: String| {
        let store = ImageStore::open(paths.node(&name).images())?;
        Ok((name, store))
    };
    cluster.nodes.into_iter().map(open).collect()
}

fn table(rows: &[(&String, Image)]) -> String {
    let mut text = format!("{:<16} {:<48} {:<14} {:>9}\n", "NODE", "IMAGE", "ID", "SIZE");
    for (node, image) in rows {
        let id: String = image.id.trim_start_matches("sha256:").chars().take(12).collect();
        let mebibytes = image.size_bytes.div_ceil(1 << 20);
        let tags = if image.tags.is_empty() { "<none>".to_owned() } else { image.tags.join(",") };
        text.push_str(&format!("{node:<16} {tags:<48} {id:<14} {mebibytes:>5} MiB\n"));
    }
    text
}

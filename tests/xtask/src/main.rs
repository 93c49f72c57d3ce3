//! Entry point.
mod facts;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [_, "facts", swagger, discovery, out] => {
            facts::generate(swagger.as_ref(), discovery.as_ref(), out.as_ref())
        }
        _ => anyhow::bail!("usage: xtask facts <swagger.json> <discovery folder> <out>"),
    }
}

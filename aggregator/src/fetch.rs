//! To come.

use anyhow::Result;
use clap::Args;
use oscontainer_program::options::Global;

#[derive(Debug, Clone, Args)]
pub struct FetchArgs {}

pub fn main(_args: FetchArgs, _global: &Global) -> Result<()> {
    anyhow::bail!("to come")
}

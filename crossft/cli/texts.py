"""The help texts of the commands that need no parser for them; printed before anything heavy is imported."""

__all__ = ["COMMANDS", "HELP", "USAGE"]

COMMANDS = {
    "fit": ("fit", "train a run: the source first where the config says so, then the target or a sequence"),
    "resume": ("fit", "continue a run from its folder, to the same bits"),
    "test": ("evaluate", "measure a run's model on the test splits"),
    "validate": ("evaluate", "measure a run's model on the validation splits"),
    "baseline": ("baseline", "measure TF-IDF and frozen-feature classifiers on a run's splits, beside the run"),
    "predict": ("predict", "write predictions for files, a folder or a table as CSV or Parquet"),
    "average": ("average", "blend finished models and measure the blends: WiSE-FT, uniform and greedy soups"),
    "export": ("export", "write a run's backbone as a plain timm state or a transformers folder"),
    "inspect": ("inspect", "print the stages of a config's model, with parameter counts"),
    "list": ("catalog", "list the methods, backbones or tasks, with the paper each"),
    "sweep": (
        "sweep",
        "plan, run, or submit to SLURM every arm and seed of a sweep file; goes on where it was stopped",
    ),
    "cache": ("cache", "list or remove the stored activations of frozen backbones"),
    "frontier": ("frontier", "draw target gain against source retention over each method's strengths"),
    "compare": ("compare", "put runs side by side: gain and retention with confidence intervals"),
}
"""Each command's module, and what it is for."""

USAGE = """usage: crossft COMMAND [ARGUMENTS]      (crossft COMMAND --help explains a command)

Fine-tune pretrained vision and text models across named domains, with every method a switch,
and the gain on the target and the retention on the source always measured.

commands:
{commands}

first steps:
  crossft fit --config configs/vision/domains.yaml --data.root DIR --data.source photo --data.target sketch
  crossft fit --config configs/text/domains.yaml   --data.root DIR --data.source books --data.target kitchen
  crossft fit --config configs/vision/domains.yaml --data.root DIR --sequence photo,art_painting,sketch
DIR holds one folder (DOMAIN/CLASS/image) or one file (DOMAIN.csv|tsv|jsonl|parquet) a domain.
"""

_MEASURE = """usage: crossft {0} RUN [--output FILE.json] [--data.root DIR] [--KEY VALUE ...]

Measure the model of a run, or of a checkpoint inside one, on the {1} splits of its domains.
Settings come from the run's config.yaml; a flag wins over it."""

HELP = {
    "resume": """usage: crossft resume RUN [--allow PACKAGE]

Continue an unfinished run from its latest valid checkpoint, to the same bits, with its own config.
A run whose source was still being fitted continues there.
--allow PACKAGE lets its config name classes of one more package; it is asked for again at every resume.""",
    "test": _MEASURE.format("test", "test"),
    "validate": _MEASURE.format("validate", "validation"),
    "predict": """usage: crossft predict RUN --data.inputs FILE|FOLDER|TABLE ... --output OUT.csv|OUT.parquet
                       [--domain NAME] [FLAGS]

Predict files with a run's model: one row an image file, or one row a line of a table, in the order given.
Columns: input, predicted, and one probability a label (p_LABEL); for regression input and predicted.
--domain NAME predicts with the head (and BatchNorm statistics) of that domain. Default: the run's first target.""",
    "baseline": """usage: crossft baseline RUN ... [--KEY=VALUE ...]

Measure what needs no fine-tuning on exactly the splits and training labels of finished runs (or of all below a folder):
tfidf    words and pairs of words, logistic regression (texts)
frozen   features of the pretrained backbone, as it is before any training, logistic regression
Prints them beside each run, and writes them into its summary.json as baseline/NAME/DOMAIN/test/METRIC.
Runs that share data, splits and backbone are measured once.""",
    "average": """usage: crossft average RUN [--alpha 0,0.5,1] [FLAGS]
       crossft average RUN RUN ... [--greedy METRIC] [FLAGS]
FLAGS: [--reestimate source|target] [--output FILE.csv] [--save FILE.ckpt]

Measure blends of finished models on the test splits of all domains; nothing is trained.
One run: WiSE-FT, the line between the model it started from (alpha 0) and its own (alpha 1).
Several: each alone, their uniform soup, and with --greedy the greedy soup by a validation metric (target/val/accuracy).
--reestimate computes BatchNorm statistics of each blend anew on that role's training rows; else they are blended.
--save writes the last blend as a checkpoint for --init.""",
    "export": """usage: crossft export RUN --to timm|hf FOLDER

Write a run's model in a form that needs no crossft.
--to timm: model.safetensors and config.json, for timm.create_model("local-dir:FOLDER").
--to hf: a save_pretrained folder with its tokenizer, for transformers.AutoModel.from_pretrained(FOLDER).
The heads lie beside it: heads.safetensors (HEAD.weight [k, d], HEAD.bias [k]) and heads.json, one entry a domain:
its head, kind and labels, the pooling that makes the features [d], and the output that makes predictions of
features @ weight.T + bias: softmax, sigmoid, or none (regression, in the label's own units).
timm: images of image_size; with pooling model, features = net(x). Else pool forward_features(x), mean or max over the
positions after the first prefix_tokens or cls, the first; hand it as a 1 x 1 map (tokens: repeated prefix_tokens + 1
times) to forward_head(pooled, pre_logits=True). hf: texts cut at max_length tokens; mean or max of last_hidden_state
where attention_mask is 1, or cls, the first of these.""",
    "inspect": """usage: crossft inspect --config FILE [--KEY VALUE ...] [--curve FILE.png [--steps N]]

Print the stages of a config's model, input to output: parameters, how many of them train, buffers; then the ledger of
each phase: what trains, in which mode, at which learning rate and decay, and how far the backward pass goes.
With --data.root and the names of domains their labels are read (no image is), so that heads, discriminators and the
number of steps are those of the run; else one head of two classes stands in. A last phase that cannot be reached is
refused.
--curve FILE.png draws every group's learning rate over the run, from the real schedule; --steps N: its optimizer
steps, where neither the data nor trainer.max_steps say.""",
}

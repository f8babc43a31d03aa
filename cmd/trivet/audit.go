package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller/meta"
)

func newAudit(o *options) *cobra.Command {
	return group("audit", "See what was done to data that cannot be undone, and verify that no record was changed",
		newAuditList(o), newAuditVerify(o))
}

type auditView struct {
	Base    string             `json:"base,omitempty"`
	Records []meta.AuditRecord `json:"records"`
}

func newAuditList(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List deletions, wipes, forced detaches and recoveries, oldest first",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				resp, err := c.ListAudit(ctx, &api.ListAuditRequest{})
				if err != nil {
					return err
				}
				a, err := auditOf(resp)
				if err != nil {
					return err
				}
				view := auditView{Base: a.Base, Records: append([]meta.AuditRecord{}, a.Records...)}
				return o.show(cmd.OutOrStdout(), view, auditTable(a))
			})
		},
	}
}

func auditTable(a meta.Audit) table {
	t := table{header: []string{"SEQ", "TIME", "WHAT", "VOLUME", "NAME", "NODE", "BY", "DETAIL", "HASH"}}
	for _, r := range a.Records {
		volume, at := "", ""
		if r.Volume != 0 {
			volume = r.Volume.String()
		}
		if !r.Time.IsZero() {
			at = r.Time.Format(time.RFC3339)
		}
		t.rows = append(t.rows, []string{
			utoa(r.Seq), at, string(r.Kind), volume, r.Name, string(r.Node), string(r.By), r.Detail,
			r.Hash[:min(12, len(r.Hash))],
		})
	}
	return t
}

// auditOf reads what a server sent; what it says of the hashes is not believed (meta.Audit.Verify).
func auditOf(l *api.AuditLog) (meta.Audit, error) {
	a := meta.Audit{Base: l.GetBase()}
	for _, r := range l.GetRecords() {
		at, err := time.Parse(time.RFC3339Nano, r.GetTime())
		if err != nil {
			return a, fmt.Errorf("audit record %d: time: %w", r.GetSeq(), err)
		}
		rec := meta.AuditRecord{
			Seq: r.GetSeq(), Time: at.UTC(), Kind: meta.AuditKind(r.GetKind()), By: trivet.NodeID(r.GetBy()), Name: r.GetName(),
			Node: trivet.NodeID(r.GetNode()), Detail: r.GetDetail(), Hash: r.GetHash(),
		}
		if r.GetVolume() != "" {
			if rec.Volume, err = trivet.ParseVolumeID(r.GetVolume()); err != nil {
				return a, fmt.Errorf("audit record %d: %w", r.GetSeq(), err)
			}
		}
		a.Records = append(a.Records, rec)
	}
	return a, nil
}

func newAuditVerify(o *options) *cobra.Command {
	var anchor string
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Compute the hashes of all audit records anew, on every node that answers",
		Long: "Compute the hashes of all audit records anew, from the copies of every node that answers, and print the\n" +
			"newest as SEQ:HASH. A record that was changed, left out or put in is an error. Who holds all copies of the\n" +
			"catalogue could make a new chain: write SEQ:HASH down somewhere else, and give it by --anchor later.",
		Example: "  trivet audit verify --anchor 17:5d41402abc4b2a76b9719d911017c592...",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.call(cmd, func(ctx context.Context, c *client) error {
				resp, err := c.ListAudit(ctx, &api.ListAuditRequest{})
				if err != nil {
					return err
				}
				truth, err := auditOf(resp)
				if err == nil {
					err = verifyAudit(truth, anchor)
				}
				if err != nil {
					return err
				}
				nodes, err := c.ListNodes(ctx, &api.ListNodesRequest{})
				if err != nil {
					return err
				}
				return o.verifyCopies(ctx, cmd, truth, nodes.GetNodes())
			})
		},
	}
	cmd.Flags().StringVar(&anchor, "anchor", "", "SEQ:HASH that an earlier verify printed")
	return cmd
}

// verifyAudit checks a chain, and that it goes through the record of an anchor.
func verifyAudit(a meta.Audit, anchor string) error {
	if err := a.Verify(); err != nil || anchor == "" {
		return err
	}
	text, hash, ok := strings.Cut(anchor, ":")
	seq, err := strconv.ParseUint(text, 10, 64)
	if !ok || err != nil || hash == "" {
		return usageError{fmt.Errorf("anchor %q: want SEQ:HASH", anchor)}
	}
	if len(a.Records) > 0 && a.Records[0].Seq == seq+1 && a.Base == hash {
		return nil
	}
	for _, r := range a.Records {
		if r.Seq == seq && r.Hash == hash {
			return nil
		}
		if r.Seq == seq {
			return fmt.Errorf("audit: record %d has hash %s, not that of the anchor", seq, r.Hash)
		}
	}
	return fmt.Errorf("audit: record %d of the anchor is not among those that are kept", seq)
}

// sameAudit says where a copy, which may lag, contradicts the truth, "" when nowhere.
func sameAudit(truth, held meta.Audit) error {
	if err := held.Verify(); err != nil {
		return err
	}
	hashes := map[uint64]string{}
	for _, r := range truth.Records {
		hashes[r.Seq] = r.Hash
	}
	for _, r := range held.Records {
		if want, ok := hashes[r.Seq]; ok && want != r.Hash {
			return fmt.Errorf("audit: record %d has hash %s there, %s elsewhere", r.Seq, r.Hash, want)
		}
	}
	return nil
}

type verifyView struct {
	Records int               `json:"records"`
	Head    string            `json:"head"`
	Nodes   map[string]string `json:"nodes"`
}

// verifyCopies verifies the copy of every node. A node that is not asked is shown, and no error.
func (o *options) verifyCopies(ctx context.Context, cmd *cobra.Command, truth meta.Audit, nodes []*api.Node) error {
	seq, hash := truth.Head()
	view := verifyView{Records: len(truth.Records), Head: fmt.Sprintf("%d:%s", seq, hash), Nodes: map[string]string{}}
	t := table{header: []string{"NODE", "COPY"}}
	var bad error
	for _, n := range nodes {
		is := "verified"
		if n.GetState() != "Up" {
			is = "not asked: " + n.GetState()
		} else if err := o.verifyCopy(ctx, n.GetAddress(), truth); err != nil {
			is, bad = err.Error(), fmt.Errorf("audit: the copy of node %s: %w", n.GetId(), err)
		}
		view.Nodes[n.GetId()] = is
		t.rows = append(t.rows, []string{n.GetId(), is})
	}
	if err := o.show(cmd.OutOrStdout(), view, t); err != nil {
		return err
	}
	if bad == nil && o.output == outputTable {
		fmt.Fprintf(cmd.OutOrStdout(), "\n%d records verified; newest %s\n", view.Records, view.Head)
	}
	return bad
}

func (o *options) verifyCopy(ctx context.Context, address string, truth meta.Audit) error {
	c, err := o.dial(address)
	if err != nil {
		return err
	}
	defer c.conn.Close()
	resp, err := c.ListAudit(ctx, &api.ListAuditRequest{Local: true})
	if err != nil {
		return fmt.Errorf("not asked: %w", err)
	}
	held, err := auditOf(resp)
	if err != nil {
		return err
	}
	return sameAudit(truth, held)
}
